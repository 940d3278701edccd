"""Reading: what people bring is checked before it is believed, by one function per kind of file.

A task reads its data through these functions alone. What is wrong is a `DataError` that names the file and the place in
it; a file that is not there, or may not be read, is an `OSError`, which names the file too.
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
Found = tuple[str, Row]  # where a sample stands, such as "train.tsv, line 7", and its fields

HIDDEN = -1  # the label of samples whose labels are not public, as on the Hugging Face hub
LISTED = 20  # names in a message
LINE_END = re.compile(rb"\r\n?|\n")
SURROGATE = re.compile("[\ud800-\udfff]")
PLAIN_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
UTF_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
UNITS: dict[str, Callable[[str], int]] = {  # of what stands before an answer
    "in UTF-16 units, as in JavaScript and Java": lambda before: len(before.encode("utf-16-le")) // 2,
    "in UTF-8 bytes": lambda before: len(before.encode()),
    "from 1": lambda before: len(before) + 1,
}


class DataError(ValueError):
    """Data that are not what they should be. The message names the file and the place, and says what to do."""


# --- text ---------------------------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """A file's bytes. Raises OSError; DataError for a path that no file can have, such as one with a NUL, and for a
    pipe or a device."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file")  # but a pipe, which would be waited for, or a device without end
    try:
        return path.read_bytes()
    except ValueError as error:
        raise DataError(f"{str(path)!r} is no path: {error}") from None


def read_text(path: Path) -> str:
    """A file in UTF-8, with or without a mark at its beginning, its line ends as "\\n".

    Raises OSError; DataError naming line and byte where it is not UTF-8, or has a NUL byte.
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
        whole = raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{_byte_location(path, raw, error.start)} is not UTF-8: save the file as UTF-8") from None
    return whole.replace("\r\n", "\n").replace("\r", "\n")


def _byte_location(path: Path, raw: bytes, at: int) -> str:
    ends = [found.end() for found in LINE_END.finditer(raw, 0, at)]
    return f"{path}, line {len(ends) + 1}, byte {at - (ends[-1] if ends else 0) + 1} (0x{raw[at]:02x})"


def read_lines(path: Path) -> list[str]:
    """A text file's lines, without empty ones at the end. Not splitlines: texts may hold what it takes for an end."""
    found = read_text(path).split("\n")
    while found and not found[-1]:
        found.pop()
    return found


def read_table(path: Path, columns: Sequence[str]) -> list[Found]:
    """The rows of a file whose fields are set apart by tabs and whose first line names the columns.

    columns: which it must have; it may have others, in any order. Raises OSError; DataError naming the line.
    """
    first, *rest = read_lines(path) or [""]
    names = first.split("\t")
    missing, twice = [name for name in columns if name not in names], _duplicates(names)
    if missing or twice:
        wrong = f"no column {missing[0]!r}" if missing else f"column {twice[0]!r} twice"
        raise DataError(
            f"{path}, line 1: {wrong}; the first line names the columns, such as {'<TAB>'.join(columns)}, and here it"
            f" is {_shortened_repr(first)}"
        )
    found = []
    for number, line in enumerate(rest, 2):
        fields = line.split("\t")
        if len(fields) != len(names):
            count = f"{len(fields)} field{'s'[: len(fields) != 1]}"
            raise DataError(f"{path}, line {number}: {count}, the first line names {len(names)}: {', '.join(names)}")
        found.append((f"{path}, line {number}", dict(zip(names, fields, strict=True))))
    return _require_rows(path, found)


def read_json_lines(path: Path) -> list[Found]:
    """The objects of a file that has one in JSON on every line. Raises OSError; DataError naming the line."""
    found = []
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {number}"
        found.append((where, check_type(_parse_json(line, where, own_lines=False), dict, where)))
    return _require_rows(path, found)


def read_json(path: Path) -> Row:
    """The object that a file in JSON is. Raises OSError; DataError naming the line, or the place in the document."""
    return check_type(_parse_json(read_text(path), str(path), own_lines=True), dict, str(path))


def _require_rows(path: Path, found: list[Found]) -> list[Found]:
    if not found:
        raise DataError(f"{path} has no samples")
    return found


class _Object(dict[str, Any]):
    """An object in JSON that knows which of its fields stood there twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice = _duplicates([name for name, _ in pairs]) if len(pairs) > len(self) else []


def _parse_json(document: str, where: str, own_lines: bool) -> Any:
    try:
        whole = json.loads(document, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if own_lines else ""
        raise DataError(f"{where}{line}, column {error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of very many digits; brackets in brackets
        raise DataError(f"{where}: cannot be read as JSON: {error}") from None
    left: list[tuple[str, Any]] = [("", whole)]  # not by recursion: it may be nested as deep as Python goes
    while left:
        place, value = left.pop()
        wrong = ""
        if isinstance(value, _Object):
            wrong = f"field {_shortened_repr(value.twice[0])} twice" if value.twice else ""
            left += [(f"{place}.{name}".lstrip("."), inner) for name, inner in reversed(value.items())]
            left += [(f"{place}.{name!a}".lstrip("."), name) for name in value if not name.isascii()]
        elif isinstance(value, list):
            left += [(f"{place}[{i}]", value[i]) for i in reversed(range(len(value)))]
        elif isinstance(value, float) and not math.isfinite(value):
            wrong = f"{value} is no number of JSON"
        elif isinstance(value, str) and not value.isascii() and SURROGATE.search(value):
            wrong = f"half a surrogate pair, {ascii(value)[:60]}: no text"
        if wrong:
            raise DataError(f"{where}{': ' if place else ''}{place}: {wrong}")
    return whole


# --- fields -------------------------------------------------------------------------------------------------------


def check_type(value: Any, kind: type[T], where: str) -> T:
    """The value, which must be of a kind of JSON: str, int (no bool), float, bool, list, dict."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        found = KINDS.get(dict if isinstance(value, dict) else type(value), _shortened_repr(value))
        raise DataError(f"{where}: {KINDS[kind]} is needed, not {found}")
    return value


def field(row: Mapping[str, Any], name: str, kind: type[T], where: str) -> T:
    """A field that must be there, and of a kind. Other fields are passed over."""
    return check_type(_require_field(row, name, where), kind, f"{where}: field {name!r}")


def _require_field(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise DataError(f"{where}: no field {name!r}; there {_are(list(row))}")
    return row[name]


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field with a text that is not empty, without blanks at its ends."""
    found = field(row, name, str, where).strip()
    if not found:
        raise DataError(f"{where}: field {name!r} is empty")
    return found


def class_numbers(
    found: Sequence[Found],
    names: Sequence[str] = (),
    training: Collection[int] = (),
    may_hide: bool = False,
    all_there: bool = True,
) -> list[int]:
    """The classes of a part's samples, by their field "label": a class's name or its number.

    names: what files call the classes 0, 1, ...; none: classes are numbers, from 0 without gaps. training: classes that
    the training part has; none: this is the training part, whose samples must differ. may_hide: the part's labels may
    not be public, which is that they are all -1, or not there; then there are no classes, []. all_there: False for one
    client's samples, which need not have every class. Raises DataError.
    """
    numbers = [_class_number(row, names, where, may_hide) for where, row in found]
    if may_hide and all(number == HIDDEN for number in numbers):
        return []
    present = set(numbers)
    gap = next(number for number in range(len(present) + 1) if number not in present)  # before it there is none
    for (where, row), number in zip(found, numbers, strict=True):
        label = f"{where}: label {_shortened_repr(row.get('label'))}"
        if number == HIDDEN:
            raise DataError(f"{label}, as where labels are hidden, but other samples of this part have theirs")
        if training and number not in training:
            raise DataError(f"{label} is none of the training part's: {_classes(training, names)}")
        if not all_there:
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
        return HIDDEN
    label = _require_field(row, "label", where)
    if isinstance(label, str | bool) and str(label) in names:
        return names.index(str(label))
    if isinstance(label, str) and (PLAIN_NUMBER.fullmatch(label) or label == str(HIDDEN)):
        label = int(label)
    number = label if isinstance(label, int) and not isinstance(label, bool) else None
    if number is not None and (0 <= number < (len(names) or number + 1) or (number == HIDDEN and may_hide)):
        return number
    known = f"the classes are {join_names(names)}" if names else "a class is a number from 0 on, in plain digits"
    raise DataError(f"{where}: label {_shortened_repr(label)}: {known}")


def _classes(numbers: Collection[int], names: Sequence[str]) -> str:
    return join_names([names[n] if names else str(n) for n in sorted(numbers)])


class Answer(NamedTuple):
    """A text that is said to stand in another. where: of the message. start: in characters, from 0."""

    where: str
    context: str
    text: str
    start: int


def check_answer_offsets(answers: Sequence[Answer]) -> None:
    """Every answer stands in its context where it is said to. All of a file's answers tell how it counts.

    Raises DataError for the first that does not, with what stands there instead, where it does stand, and how its
    offset was counted, if it was so counted that UTF-16 units, bytes of UTF-8 or a beginning at 1 explain it.
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
        units = [unit for unit in UNITS if _offset_matches(answer, unit)]
        of_all = [unit for unit in units if all(_offset_matches(other, unit) for other in answers)]
        if units:
            how = "offsets are" if of_all else "as if"
            message += f": {how} counted {' or '.join(of_all or units)}; count them in characters, from 0"
        raise DataError(message)


def _offset_matches(answer: Answer, unit: str) -> bool:
    _, context, text, start = answer
    places = re.finditer(f"(?={re.escape(text)})", context)
    return any(UNITS[unit](context[: found.start()]) == start for found in places)


# --- the Hugging Face hub -----------------------------------------------------------------------------------------


def load_from_hub(*name: str, parts: Sequence[str]) -> list[Any]:
    """Parts of a data set of the Hugging Face hub.

    Raises ImportError without `datasets`, OSError where it cannot be loaded, DataError where it has no such part.
    """
    try:
        load: Callable[..., Any] = importlib.import_module("datasets").load_dataset
    except ImportError as error:
        raise ImportError(
            f"without data, a folder, {name[0]} comes from the Hugging Face hub, which needs datasets:"
            " pip install 'hosfl[hf]'"
        ) from error
    try:
        found = load(*name)
    except OSError:
        raise
    except Exception as error:  # such as of data sets that come as a program
        raise OSError(f"cannot load {' '.join(name)} from the Hugging Face hub: {error}") from error
    for part in parts:
        if part not in found:
            raise DataError(f"{' '.join(name)} has no part {part!r}; there {_are(list(found))}")
    return [found[part] for part in parts]


def hub_rows(*name: str, parts: Sequence[str]) -> list[list[Found]]:
    """The rows of parts, each with its place. Raises what `load_from_hub` raises."""
    found = load_from_hub(*name, parts=parts)
    return [
        [(f"{' '.join(name)}, {part}, row {number}", row) for number, row in enumerate(rows)]
        for part, rows in zip(parts, found, strict=True)
    ]


def hub_column(rows: Any, name: str, where: str) -> Any:
    """A column of a part. Raises DataError where it is not there, or cannot be decoded."""
    try:
        return rows[name]
    except Exception as error:
        raise DataError(f"{where}: column {name!r} cannot be read: {type(error).__name__}: {error}") from None


# --- arrays, and functions that return samples --------------------------------------------------------------------


def load_arrays(path: str, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The arrays of a file, .npz or .safetensors, by name. load: reads the latter.

    Raises OSError, and DataError for a file that holds none.
    """
    try:
        if path.endswith(".safetensors"):
            return load(Path(path))
        file = regular(path)
        with ZipFile(file), np.load(file, allow_pickle=False) as arrays:  # numpy takes what is no zip for a pickle
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # of zip, zlib, numpy or safetensors, of whatever kind: the file may hold anything
        if isinstance(error, OSError) and error.filename:  # it is not there, or may not be read
            raise
        raise DataError(f"{path} is damaged, or holds no arrays of numbers ({error}): save it again") from None


def call_user_function(data: str) -> Any:
    """What the function of FILE.py:FUNCTION returns. Raises DataError for one that needs arguments, and ValueError."""
    made = load_object(data, "data", {})
    try:
        signature(made).bind()
    except TypeError as error:
        raise DataError(
            f"{data} is no function without arguments ({error}): one that returns samples is needed"
        ) from None
    return made()


# --- messages -----------------------------------------------------------------------------------------------------


def join_names(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(list(names)[:LISTED]) + more


def _are(names: Collection[str]) -> str:
    return f"are {join_names(names)}" if names else "is none"


def _shortened_repr(value: Any) -> str:
    whole = "null" if value is None else repr(value)
    return whole if len(whole) <= 80 else whole[:77] + "..."


def _duplicates(names: Sequence[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]
