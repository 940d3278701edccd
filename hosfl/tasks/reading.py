"""Reading and checking data files, with a function for each kind of file.

Tasks read their data through these functions only. Invalid data are a `DataError` that names the file and the place in
it. A file that is missing or unreadable is an `OSError`, which names the file too.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zipfile import ZipFile

import numpy as np

from hosfl.files import regular
from hosfl.references import load_object

T = TypeVar("T")
Row = dict[str, Any]  # the fields of a sample by name
LocatedRow = tuple[str, Row]  # the place of a sample, such as "train.tsv, line 7", and its fields

HIDDEN_LABEL = -1  # the label of samples whose labels are not public, as on the Hugging Face hub
MAX_LISTED = 20  # names that a message lists at most
LINE_END = re.compile(rb"\r\n?|\n")
SURROGATE = re.compile("[\ud800-\udfff]")
PLAIN_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
UTF_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
OFFSET_UNITS: dict[str, Callable[[str], int]] = {  # wrong ways to count an offset: from the text before an answer
    "in UTF-16 units, as in JavaScript and Java": lambda before: len(before.encode("utf-16-le")) // 2,
    "in UTF-8 bytes": lambda before: len(before.encode()),
    "from 1": lambda before: len(before) + 1,
}


class DataError(ValueError):
    """Data are invalid. The message names the file and the place, and says what to do."""


# --- text ---------------------------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """Read a file. Raises OSError; DataError for an impossible path, such as one with a NUL, for a pipe or a device."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file")  # reading a pipe would block, and a device may have no end
    try:
        return path.read_bytes()
    except ValueError as error:
        raise DataError(f"{str(path)!r} is no path: {error}") from None


def read_text(path: Path) -> str:
    """Read a file in UTF-8, with or without a byte order mark. Line ends become "\\n".

    Raises OSError; DataError naming line and byte for what is not UTF-8, and for NUL bytes.
    """
    raw = read_bytes(path)
    for mark, name in UTF_MARKS.items():
        if raw.startswith(mark):
            raise DataError(f"{path} is in {name}: save it as UTF-8")
    if 0 in raw:
        raise DataError(
            f"{_byte_location(path, raw, raw.index(0))} is a NUL: the file is damaged, or not UTF-8; make it again, or"
            " save it as UTF-8"
        )
    try:
        text = raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{_byte_location(path, raw, error.start)} is not UTF-8: save the file as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _byte_location(path: Path, raw: bytes, offset: int) -> str:
    ends = [match.end() for match in LINE_END.finditer(raw, 0, offset)]
    return f"{path}, line {len(ends) + 1}, byte {offset - (ends[-1] if ends else 0) + 1} (0x{raw[offset]:02x})"


def read_lines(path: Path) -> list[str]:
    """Read a text file's lines, without empty ones at its end.

    Lines end at line feeds only, unlike those of `str.splitlines`, whose other line ends may be part of a text.
    """
    lines = read_text(path).split("\n")
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_table(path: Path, columns: Sequence[str]) -> list[LocatedRow]:
    """Read the rows of a file with tab-separated fields, whose first line names the columns.

    columns: those that it must have; others are allowed, in any order. Raises OSError; DataError naming the line.
    """
    first, *rest = read_lines(path) or [""]
    names = first.split("\t")
    missing, twice = [name for name in columns if name not in names], _duplicates(names)
    if missing or twice:
        problem = f"no column {missing[0]!r}" if missing else f"column {twice[0]!r} twice"
        raise DataError(
            f"{path}, line 1: {problem}; the first line names the columns, such as {'<TAB>'.join(columns)}, and here it"
            f" is {_shortened_repr(first)}"
        )
    rows = []
    for number, line in enumerate(rest, 2):
        fields = line.split("\t")
        if len(fields) != len(names):
            count = f"{len(fields)} field{'s'[: len(fields) != 1]}"
            raise DataError(f"{path}, line {number}: {count}, the first line names {len(names)}: {', '.join(names)}")
        rows.append((f"{path}, line {number}", dict(zip(names, fields, strict=True))))
    return _require_rows(path, rows)


def read_json_lines(path: Path) -> list[LocatedRow]:
    """Read a file with a JSON object on every line. Raises OSError; DataError naming the line."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {number}"
        rows.append((where, check_type(_parse_json(line, where, has_lines=False), dict, where)))
    return _require_rows(path, rows)


def read_json(path: Path) -> Row:
    """Read a file that is one JSON object. Raises OSError; DataError naming the line, or the place in the document."""
    return check_type(_parse_json(read_text(path), str(path), has_lines=True), dict, str(path))


def _require_rows(path: Path, rows: list[LocatedRow]) -> list[LocatedRow]:
    if not rows:
        raise DataError(f"{path} has no samples")
    return rows


class _Object(dict[str, Any]):
    """A JSON object with `twice`, the names of its duplicate fields."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice = _duplicates([name for name, _ in pairs]) if len(pairs) > len(self) else []


def _parse_json(document: str, where: str, has_lines: bool) -> Any:
    """Parse JSON strictly: without duplicate fields, infinity, NaN and lone surrogates.

    where: the document's place, for errors. has_lines: whether errors add a line number to it.
    """
    try:
        root = json.loads(document, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if has_lines else ""
        raise DataError(f"{where}{line}, column {error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits; too deep nesting
        raise DataError(f"{where}: cannot be read as JSON: {error}") from None
    stack: list[tuple[str, Any]] = [("", root)]  # no recursion: the document may be nested up to Python's limit
    while stack:
        place, value = stack.pop()
        problem = ""
        if isinstance(value, _Object):
            problem = f"field {_shortened_repr(value.twice[0])} twice" if value.twice else ""
            stack += [(f"{place}.{name}".lstrip("."), inner) for name, inner in reversed(value.items())]
            stack += [(f"{place}.{name!a}".lstrip("."), name) for name in value if not name.isascii()]
        elif isinstance(value, list):
            stack += [(f"{place}[{i}]", value[i]) for i in reversed(range(len(value)))]
        elif isinstance(value, float) and not math.isfinite(value):
            problem = f"{value} is no number of JSON"
        elif isinstance(value, str) and not value.isascii() and SURROGATE.search(value):
            problem = f"half a surrogate pair, {ascii(value)[:60]}: no text"
        if problem:
            raise DataError(f"{where}{': ' if place else ''}{place}: {problem}")
    return root


# --- fields -------------------------------------------------------------------------------------------------------


def check_type(value: Any, kind: type[T], where: str) -> T:
    """Return a value of JSON. Raises DataError unless it has the type: str, int (no bool), float, bool, list, dict."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        actual = TYPE_NAMES.get(dict if isinstance(value, dict) else type(value), _shortened_repr(value))
        raise DataError(f"{where}: {TYPE_NAMES[kind]} is needed, not {actual}")
    return value


def field(row: Mapping[str, Any], name: str, kind: type[T], where: str) -> T:
    """Return a row's field. Raises DataError if it is missing, or not of the type. Other fields are ignored."""
    return check_type(_require_field(row, name, where), kind, f"{where}: field {name!r}")


def _require_field(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise DataError(f"{where}: no field {name!r}; there {_list_or_none(list(row))}")
    return row[name]


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """Return a field's text, without blanks at its ends. Raises DataError if it is missing or empty."""
    text = field(row, name, str, where).strip()
    if not text:
        raise DataError(f"{where}: field {name!r} is empty")
    return text


def class_numbers(
    rows: Sequence[LocatedRow],
    names: Sequence[str] = (),
    training: Collection[int] = (),
    may_hide: bool = False,
    require_all: bool = True,
) -> list[int]:
    """Return the number of each row's class, from its field "label", which is a class's name or number.

    names: of the classes 0, 1, ... in files; none: classes are numbers, from 0 without gaps. training: the classes of
    the training part; none: these rows are the training part, and must have several classes. may_hide: whether the
    labels may be hidden, that is missing or -1 in all rows; then the result is []. require_all: False for one client's
    samples, which need not have every class. Raises DataError.
    """
    numbers = [_class_number(row, names, where, may_hide) for where, row in rows]
    if may_hide and all(number == HIDDEN_LABEL for number in numbers):
        return []
    present = set(numbers)
    gap = next(number for number in range(len(present) + 1) if number not in present)  # the smallest missing number
    for (where, row), number in zip(rows, numbers, strict=True):
        label = f"{where}: label {_shortened_repr(row.get('label'))}"
        if number == HIDDEN_LABEL:
            raise DataError(f"{label}, as where labels are hidden, but other samples of this part have theirs")
        if training and number not in training:
            raise DataError(f"{label} is none of the training part's: {_join_classes(training, names)}")
        if not require_all:
            continue
        if not training and not names and number > gap:
            raise DataError(f"{label}, but there is no {gap}: classes are numbered from 0 without gaps")
        if not training and len(present) == 1:
            raise DataError(
                f"{label}, and so in all of the training part: it has one class only, so that there is nothing to learn"
            )
    return numbers


def _class_number(row: Row, names: Sequence[str], where: str, may_hide: bool) -> int:
    if may_hide and "label" not in row:
        return HIDDEN_LABEL
    label = _require_field(row, "label", where)
    if isinstance(label, str | bool) and str(label) in names:
        return names.index(str(label))
    if isinstance(label, str) and (PLAIN_NUMBER.fullmatch(label) or label == str(HIDDEN_LABEL)):
        label = int(label)
    number = label if isinstance(label, int) and not isinstance(label, bool) else None
    if number is not None and (0 <= number < (len(names) or number + 1) or (number == HIDDEN_LABEL and may_hide)):
        return number
    known = f"the classes are {join_names(names)}" if names else "a class is a number from 0 on, in plain digits"
    raise DataError(f"{where}: label {_shortened_repr(label)}: {known}")


def _join_classes(numbers: Collection[int], names: Sequence[str]) -> str:
    return join_names([names[n] if names else str(n) for n in sorted(numbers)])


class Answer(NamedTuple):
    """An answer and its stated offset in its context. where: its place, for errors. start: in characters, from 0."""

    where: str
    context: str
    text: str
    start: int


def check_answer_offsets(answers: Sequence[Answer]) -> None:
    """Raises DataError for the first answer that does not begin at its offset in its context.

    The message says what is there instead, and where the answer is. If the offset was counted in UTF-16 units, in bytes
    of UTF-8 or from 1, it says so too, and whether that explains all of the answers.
    """
    for answer in answers:
        where, context, text, start = answer
        if not text.strip():
            raise DataError(f"{where}: the answer is empty")
        if start >= 0 and context.startswith(text, start):
            continue
        message = f"{where}: the answer {_shortened_repr(text)} is said to begin at {start}, "
        if 0 <= start < len(context):
            message += f"where {_shortened_repr(context[start : start + len(text)])} stands"
        else:
            message += f"outside of its text of {len(context)} characters"
        places = [i for i in range(len(context)) if context.startswith(text, i)]
        message += f"; it begins at {join_names([str(i) for i in places])}" if places else "; the text does not have it"
        units = [unit for unit in OFFSET_UNITS if _offset_matches(answer, unit)]
        common = [unit for unit in units if all(_offset_matches(other, unit) for other in answers)]
        if units:
            how = "offsets are" if common else "as if"
            message += f": {how} counted {' or '.join(common or units)}; count them in characters, from 0"
        raise DataError(message)


def _offset_matches(answer: Answer, unit: str) -> bool:
    _, context, text, start = answer
    matches = re.finditer(f"(?={re.escape(text)})", context)
    return any(OFFSET_UNITS[unit](context[: match.start()]) == start for match in matches)


# --- the Hugging Face hub -----------------------------------------------------------------------------------------


def load_from_hub(*name: str, parts: Sequence[str]) -> list[Any]:
    """Load parts of a data set from the Hugging Face hub. name: of it, and of its configuration if it has some.

    Raises ImportError without `datasets`, OSError if it cannot be loaded, DataError if it has no such part.
    """
    try:
        load: Callable[..., Any] = importlib.import_module("datasets").load_dataset
    except ImportError as error:
        raise ImportError(
            f"without data, a folder, {name[0]} comes from the Hugging Face hub, which needs datasets:"
            " pip install 'hosfl[hf]'"
        ) from error
    try:
        dataset = load(*name)
    except OSError:
        raise
    except Exception as error:  # of any type, such as for data sets that need a loading script
        raise OSError(f"cannot load {' '.join(name)} from the Hugging Face hub: {error}") from error
    for part in parts:
        if part not in dataset:
            raise DataError(f"{' '.join(name)} has no part {part!r}; there {_list_or_none(list(dataset))}")
    return [dataset[part] for part in parts]


def hub_rows(*name: str, parts: Sequence[str]) -> list[list[LocatedRow]]:
    """Load the rows of parts from the hub, each with its place. Raises what `load_from_hub` raises."""
    loaded = load_from_hub(*name, parts=parts)
    return [
        [(f"{' '.join(name)}, {part}, row {number}", row) for number, row in enumerate(rows)]
        for part, rows in zip(parts, loaded, strict=True)
    ]


def hub_column(rows: Any, name: str, where: str) -> Any:
    """Return a column of a part. Raises DataError if it is missing, or cannot be decoded."""
    try:
        return rows[name]
    except Exception as error:
        raise DataError(f"{where}: column {name!r} cannot be read: {type(error).__name__}: {error}") from None


# --- arrays, and functions that return samples --------------------------------------------------------------------


def load_arrays(path: str, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Read the arrays of a file, .npz or .safetensors, by name. load: the function that reads the latter.

    Raises OSError, and DataError for a damaged file or one without arrays.
    """
    try:
        if path.endswith(".safetensors"):
            return load(Path(path))
        file = regular(path)
        with (
            ZipFile(file),
            np.load(file, allow_pickle=False) as arrays,
        ):  # ZipFile first: numpy takes others for pickles
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # of any type, from zip, zlib, numpy or safetensors: the file may hold anything
        if isinstance(error, OSError) and error.filename:  # it is missing or unreadable
            raise
        raise DataError(f"{path} is damaged, or holds no arrays of numbers ({error}): save it again") from None


def call_user_function(data: str) -> Any:
    """Call the function FILE.py:FUNCTION, and return its result. Raises DataError if it needs arguments; ValueError."""
    function = load_object(data, "data", {})
    try:
        signature(function).bind()
    except TypeError as error:
        raise DataError(
            f"{data} is no function without arguments ({error}): one that returns samples is needed"
        ) from None
    return function()


# --- messages -----------------------------------------------------------------------------------------------------


def join_names(names: Collection[str]) -> str:
    """Join names by commas: the first `MAX_LISTED`, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(list(names)[:MAX_LISTED]) + more


def _list_or_none(names: Collection[str]) -> str:
    return f"are {join_names(names)}" if names else "is none"


def _shortened_repr(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _duplicates(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
