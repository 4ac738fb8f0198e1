"""Atomic writes of directories and files: they appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from difflm_jax.errors import UserError, one_line


def expanded(path: str, name: str = "") -> str:
    """Returns `path` with a leading `~` or `~user` expanded. Raises `UserError` if there is no such home directory."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise UserError(f"{name}={path}: there is no such home directory") from error


@contextlib.contextmanager
def new_directory(target: str | Path, may_replace: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """Yields an empty directory to fill. It becomes `target` when the block ends without an error.

    A target that exists and is not empty is replaced only if `may_replace(target)`. Otherwise raises `UserError` before
    anything is written. A failed write raises `UserError` too.
    """
    target = Path(target).expanduser().absolute()
    occupied = check_new_directory(target, may_replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({one_line(error)})") from error
    try:
        fresh = work / "new"
        fresh.mkdir()  # with the user's umask, which mkdtemp does not respect
        yield fresh
        if occupied:
            target.rename(work / "old")
        fresh.rename(target)
    except OSError as error:
        if (work / "old").exists() and not target.exists():
            (work / "old").rename(target)
        raise UserError(f"{target}: cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_new_directory(target: Path, may_replace: Callable[[Path], bool] = lambda _: False) -> bool:
    """Returns whether `target` has contents. Raises `UserError` if they must not be replaced, or if it is a file."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file, not a directory to write to")
    occupied = target.is_dir() and any(target.iterdir())
    if occupied and not may_replace(target):
        raise UserError(f"{target}: exists and is not empty; remove it or choose another directory")
    return occupied


def check_writable(path: str | Path) -> None:
    """Raises `UserError` if no file can be written at `path`. Call it before the work, not after."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is {'a directory' if path.is_dir() else 'a device or a pipe'}, not a file to write")
    path = path.resolve()
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written ({path.parent} is no directory that can be written to)")


def write_whole(path: str | Path, data: str | bytes) -> None:
    """Replaces the file `path` by `data` atomically: a reader sees the old or the new file. Raises `UserError`."""
    path = Path(path).resolve()  # replaces what a link points to, not the link
    if isinstance(data, str):
        data = data.encode("utf-8", "backslashreplace")  # writes half a surrogate pair as JSON escapes it
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).chmod(0o666 & ~_umask())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({one_line(error)})") from error


def synced(path: Path) -> None:
    """Flushes a file, or the entries of a directory, to disk, where they survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
