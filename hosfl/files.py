"""Files that are written completely or not at all, and folders that one process locks."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]


SMALL = 1 << 28  # bytes: more than any file of settings, results or certificates has


def regular(path: str | os.PathLike[str]) -> Path:
    """The path of a regular file. Reading a pipe may wait for ever, and reading a device such as /dev/zero never ends.

    Raises OSError naming the path for anything else, FileNotFoundError if there is nothing.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "this is no regular file: it may have no end", str(path))
    return Path(path)


def read_small(path: Path) -> bytes:
    """The content of a file of settings, results or certificates. Raises OSError naming it, also if it is vast."""
    if regular(path).stat().st_size > SMALL:
        raise OSError(errno.EFBIG, f"this has more than {SMALL >> 20} MB: it is none of hosfl's files", str(path))
    return path.read_bytes()


def open_nonblocking(path: str, flags: int) -> int:
    """An opener for `open` that does not wait for a pipe's other end. Raises OSError for a pipe that nobody reads."""
    try:
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "this is a pipe that nobody reads", str(path)) from None
        raise


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give an OSError of the block this file's name if it has none, as those of writing and syncing have not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, data: bytes, private: bool = False) -> None:
    """Write a file completely or not at all, even if the process dies meanwhile. An existing file keeps its mode.

    private: for its owner alone, mode 0600 from its first byte on, whatever mode an existing file had.
    A link stays, and its target is written. What is not a regular file, such as /dev/null or a pipe, is written into,
    except a pipe that nobody reads.

    Raises OSError: IsADirectoryError for a folder, FileNotFoundError where there is no folder to write in, ....
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "this is a folder: name a file in it", str(path))
    if mode is not None and not stat.S_ISREG(mode):
        with naming(path), open(path, "wb", opener=open_nonblocking) as file:
            os.set_blocking(file.fileno(), True)
            file.write(data)
        return
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no folder to write this file in", str(path))
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of a writer that was killed
    try:
        with naming(path), open(temporary, "xb", opener=partial(os.open, mode=0o600 if private else 0o666)) as file:
            if mode is not None and not private:
                temporary.chmod(stat.S_IMODE(mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """A copy of nested dicts and lists with None in place of infinite numbers and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write standard JSON atomically, with null for numbers that are not finite."""
    write_atomically(path, (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode())


class FolderLock:
    """A lock on the folder of a run or a study, held until it is closed or the process ends.

    Raises RunFolderError where another process holds it.
    """

    def __init__(self, folder: Path, of: str = "run") -> None:
        self.path = folder / "lock"
        self.file = open(self.path, "a", opener=open_nonblocking)  # noqa: SIM115
        if not try_lock(self.file):
            self.file.close()
            raise RunFolderError(f"another process is at work on the {of} in {folder}: wait for it, or stop it")

    def check(self) -> None:
        """Raises RunFolderError where the folder was removed or replaced under the run."""
        try:
            there = os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            raise RunFolderError(f"{self.path.parent} was removed or replaced while the run went on: the run ends here")

    def close(self) -> None:
        self.file.close()


class RunFolderError(ValueError):
    """A run's folder is locked by another process, or was removed or replaced while the run went on."""


def try_lock(file: IO[Any]) -> bool:
    """Lock a file until it is closed or the process ends; False if another process has locked it."""
    if fcntl is None:
        return True
    try:
        # flock, not lockf: lockf's would end when this process closes any file object of this log, `Log.read`'s too
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make new files and renames in a folder survive a power cut. Does nothing on Windows, which cannot."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
