"""Pictures of files and of the Hugging Face hub, checked as `reading` checks other data."""

from __future__ import annotations

import io
import os
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from hosfl.extras import require
from hosfl.tasks.reading import DataError, join_names, read_bytes

PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's IMG_EXTENSIONS
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # others, such as EPS, run programs
PICTURE_ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND\xaeB`\x82"}  # of JPEG and PNG


def class_folders(
    folder: Path, training: Sequence[str] = (), all_there: bool = True
) -> tuple[list[str], list[tuple[Path, int]]]:
    """The classes of a part, by the names of its folders, and its picture files with the number of their class.

    training: the training part's classes; none: this is the training part. Classes are in the order of their names,
    which are compared in Unicode's composed form. What begins with a dot is passed over; so is, with one warning, what
    has another ending than pictures. all_there: False for one client's pictures, whose classes may be empty folders.

    Raises OSError; DataError for a class that the training part has not, or that has no pictures there.
    """
    own: dict[str, Path] = {}
    others = []
    for path in sorted(folder.iterdir()):
        name = unicodedata.normalize("NFC", path.name)
        if name.startswith("."):
            continue
        if not path.is_dir():
            others.append(path)
        elif training and name not in training:
            raise DataError(f"{path}: no class of the training part, whose folders are {join_names(training)}")
        elif name in own:
            raise DataError(f"{path} and {own[name]} are one name, written in two ways: put their pictures together")
        else:
            own[name] = path
    names = list(training) or sorted(own)
    found = []
    for label, name in enumerate(names):
        files = _files(own[name]) if name in own else []
        mine = [path for path in files if path.suffix.lower() in PICTURES]
        if not mine and not training and all_there:
            raise DataError(f"{own[name]}: a class without pictures; their names end in {', '.join(PICTURES)}")
        others += [path for path in files if path.suffix.lower() not in PICTURES]
        found += [(path, label) for path in mine]
    if not found:
        raise DataError(f"{folder}: no pictures; they belong into folders, one per class")
    if others:
        warnings.warn(
            f"{folder}: {len(others)} files are passed over, for their names do not end as those of pictures do, the"
            f" first is {others[0]}",
            stacklevel=2,
        )
    return names, found


def _files(folder: Path) -> list[Path]:
    """All files of a folder and of those inside it, in the order of their names, without what begins with a dot."""

    def fail(error: OSError) -> NoReturn:
        raise error

    found, seen = [], set()
    for here, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        seen.add(os.path.realpath(here))
        folders[:] = [
            name for name in folders if name[0] != "." and os.path.realpath(os.path.join(here, name)) not in seen
        ]
        found += [Path(here, name) for name in files if name[0] != "."]
    return sorted(found)


def picture_file(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture of a size (width, height) as uint8 [height, width, 3]. Grey of 16 bits is scaled to 8.

    Raises OSError; DataError for another size, before the picture is decoded, for a mode whose range is not known, and
    for whatever Pillow raises; ImportError without Pillow.
    """
    image = require("PIL.Image", "a picture")
    raw = read_bytes(path)
    with _pillow_errors_as_data_errors(str(path), raw), image.open(io.BytesIO(raw), formats=FORMATS) as opened:
        return _rgb(opened, str(path), size)


def _rgb(opened: Any, where: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """What Pillow has opened, in 8 bits."""
    if opened.size != size:
        raise DataError(f"{where}: a picture of {size[0]} x {size[1]} is needed, it has {opened.size}")
    if opened.mode == "F":
        raise DataError(f"{where}: its mode is F, numbers of no known range: save it with 8 or 16 bits")
    if not opened.mode.startswith("I"):
        return np.asarray(opened.convert("RGB"))
    grey = np.asarray(opened).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise DataError(
            f"{where}: its mode is {opened.mode}, with values from {grey.min()} to {grey.max()}, which is no known"
            " range: save it with 8 or 16 bits"
        )
    return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)  # 65535 / 257 = 255


@contextmanager
def _pillow_errors_as_data_errors(where: str, raw: bytes | None = None) -> Iterator[None]:
    """What Pillow raises for a damaged picture, which may be of any type, as a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        if raw is not None:
            if type(error).__name__ == "UnidentifiedImageError":
                message = f"its content is none of {', '.join(FORMATS)}"
            if not raw:
                message = "it is empty"
            if any(raw.startswith(begin) and end not in raw[-32:] for begin, end in PICTURE_ENDS.items()):
                message = f"it is truncated: {message}"
        raise DataError(f"{where} cannot be read as a picture: {message}") from None


def hub_picture(column: Any, number: int, where: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture of a column, as `picture_file` has it. Raises DataError."""
    with _pillow_errors_as_data_errors(where):
        return _rgb(column[number], where, size)
