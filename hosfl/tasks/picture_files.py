"""Reading and checking pictures, from files and the Hugging Face hub; `reading` does it for other data."""

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

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's IMG_EXTENSIONS
FORMATS = (
    "JPEG",
    "PNG",
    "PPM",
    "BMP",
    "TIFF",
    "WEBP",
    "GIF",
)  # of no others: for some, such as EPS, Pillow runs programs
MARKERS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND\xaeB`\x82"}  # first and last bytes of JPEG, PNG


def class_folders(
    folder: Path, training: Sequence[str] = (), require_all: bool = True
) -> tuple[list[str], list[tuple[Path, int]]]:
    """List a part's classes, which are the names of its folders, and its picture files with their class's number.

    training: the training part's classes; none: this is the training part. Classes are in the order of their names,
    which are compared in Unicode's composed form. Names that begin with a dot are ignored; files that do not end like
    pictures too, with one warning. require_all: False for one client's pictures, whose classes may be empty folders.

    Raises OSError; DataError for a class that the training part lacks, and for one without pictures in it.
    """
    class_paths: dict[str, Path] = {}
    ignored = []
    for path in sorted(folder.iterdir()):
        name = unicodedata.normalize("NFC", path.name)
        if name.startswith("."):
            continue
        if not path.is_dir():
            ignored.append(path)
        elif training and name not in training:
            raise DataError(f"{path}: no class of the training part, whose folders are {join_names(training)}")
        elif name in class_paths:
            raise DataError(
                f"{path} and {class_paths[name]} are one name, written in two ways: put their pictures together"
            )
        else:
            class_paths[name] = path
    names = list(training) or sorted(class_paths)
    pictures = []
    for label, name in enumerate(names):
        files = _list_files(class_paths[name]) if name in class_paths else []
        of_class = [path for path in files if path.suffix.lower() in EXTENSIONS]
        if not of_class and not training and require_all:
            raise DataError(
                f"{class_paths[name]}: a class without pictures; their names end in {', '.join(EXTENSIONS)}"
            )
        ignored += [path for path in files if path.suffix.lower() not in EXTENSIONS]
        pictures += [(path, label) for path in of_class]
    if not pictures:
        raise DataError(f"{folder}: no pictures; they belong into folders, one per class")
    if ignored:
        warnings.warn(
            f"{folder}: {len(ignored)} files are passed over, for their names do not end as those of pictures do, the"
            f" first is {ignored[0]}",
            stacklevel=2,
        )
    return names, pictures


def _list_files(folder: Path) -> list[Path]:
    """List all files of a folder and its subfolders, sorted, without names that begin with a dot."""

    def fail(error: OSError) -> NoReturn:
        raise error

    paths, seen = [], set()
    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        seen.add(os.path.realpath(parent))
        folders[:] = [
            name for name in folders if name[0] != "." and os.path.realpath(os.path.join(parent, name)) not in seen
        ]
        paths += [Path(parent, name) for name in files if name[0] != "."]
    return sorted(paths)


def picture_file(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Read a picture of a size (width, height) as uint8 [height, width, 3]. Grey of 16 bits is scaled to 8.

    Raises OSError; DataError for another size, before the picture is decoded, for a mode of unknown range, and for
    whatever Pillow raises; ImportError without Pillow.
    """
    image = require("PIL.Image", "a picture")
    raw = read_bytes(path)
    with _pillow_errors_as_data_errors(str(path), raw), image.open(io.BytesIO(raw), formats=FORMATS) as opened:
        return _rgb(opened, str(path), size)


def _rgb(opened: Any, where: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Convert a picture opened by Pillow to uint8 [height, width, 3]."""
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
    """Context manager that turns what Pillow raises for a damaged picture, of any type, into a DataError."""
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
            if any(raw.startswith(begin) and end not in raw[-32:] for begin, end in MARKERS.items()):
                message = f"it is truncated: {message}"
        raise DataError(f"{where} cannot be read as a picture: {message}") from None


def hub_picture(column: Any, number: int, where: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a picture of a hub data set's column, as `picture_file` does. Raises DataError."""
    with _pillow_errors_as_data_errors(where):
        return _rgb(column[number], where, size)
