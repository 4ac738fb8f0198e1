"""Directories and files that appear whole or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from difflm_jax.errors import UserError, one_line


@contextlib.contextmanager
def new_directory(target: str | Path, may_replace: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """Yields an empty sibling of `target` to fill, which takes its place when the block ends without an error.

    A target that exists and is not an empty directory is replaced only if `may_replace(target)`. Raises `UserError`
    otherwise, before anything is written, and when the disk refuses.
    """
    target = Path(target).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file, not a directory to write to")
    occupied = target.is_dir() and any(target.iterdir())
    if occupied and not may_replace(target):
        raise UserError(f"{target}: exists and is not empty; remove it or choose another directory")
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


def write_whole(path: Path, text: str) -> None:
    """Writes or replaces a text file: whoever reads it sees the old one or the new one. Raises `UserError`."""
    unfinished = path.with_name(f"{path.name}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({one_line(error)})") from error
