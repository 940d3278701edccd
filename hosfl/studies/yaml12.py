"""A parser of YAML 1.2's core schema, for studies' files. PyYAML's own loaders read YAML 1.1."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hosfl.extras import require

if TYPE_CHECKING:
    import yaml
else:
    yaml = require("yaml", "a study's file")

MAX_VALUES = 100_000
MAX_CHARACTERS = 1 << 20

# By the tag of a plain scalar: the pattern of its text, and the function that converts it.
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, 0 if text[1:2] in ("o", "x") else 10)),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=[a-zA-Z])", "", text)),
    ),
    "merge": (r"<<", str),
    "str": (r"[^\ud800-\udfff]*", str),  # no lone surrogate, which an escape can make and no file can hold
}


class _Loader(yaml.BaseLoader):  # type: ignore[misc, unused-ignore]  # with and without its stubs
    """A loader that finds the tags of plain scalars; if several patterns fit, the first one's."""


for _tag, (_pattern, _) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)


def parse_yaml(text: str) -> Any:
    """Parse mappings, lists and scalars of YAML 1.2's core schema, and merge keys.

    A mapping's own keys override merged ones. Raises ValueError, naming the place, also for a key that occurs twice.
    """
    count = 0
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"more than {MAX_CHARACTERS} characters: too large")

    def value(node: yaml.Node) -> Any:
        nonlocal count
        count += 1  # the values of an alias count each time
        if count > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values: too large")
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return mapping(node)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [value(item) for item in node.value]
        if not isinstance(node, yaml.ScalarNode) or kind not in _SCALARS:
            raise ValueError(f"there is no use for the tag {node.tag!r}{_location(node)}")
        pattern, convert = _SCALARS[kind]
        if not re.fullmatch(pattern, node.value):
            raise ValueError(f"{node.value!r} is no {kind}{_location(node)}")
        return convert(node.value)

    def mapping(node: yaml.MappingNode) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        own: dict[Any, Any] = {}
        merges = 0
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"a key must be one word or number{_location(key_node)}")
            key, content = value(key_node), value(value_node)
            merge = key_node.tag.endswith(":merge")
            if key in own or (merge and merges):
                raise ValueError(f"{key!r} is there twice, the second time{_location(key_node)}")
            if not merge:
                own[key] = content
                continue
            merges += 1
            for base in content if isinstance(content, list) else [content]:
                if not isinstance(base, dict):
                    raise ValueError(f"<< merges a mapping, or a list of them, and got {base!r}{_location(key_node)}")
                merged = base | merged  # the first of several has precedence
        return merged | own

    try:
        node = yaml.compose(text, _Loader)
        return None if node is None else value(node)
    except RecursionError:
        raise ValueError("nested too deeply, or an alias stands for what it is in itself") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {_describe_error(error)}") from None


def _describe_error(error: yaml.YAMLError) -> str:
    """Return the problem and its place, in one line."""
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
    reasons = [getattr(error, name, None) for name in ("context", "problem")]
    return f"{', '.join(filter(None, reasons)) or error}{where}"


def _location(node: yaml.Node) -> str:
    return f" in line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"
