"""Locks between processes of one host, or of hosts whose shared file system has locks. A crash releases them."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from difflm_jax.errors import UserError, one_line


class FileLock:
    """An exclusive lock on the file `path`. The file names the holder and is removed on release.

    The kernel releases the lock when its process ends, so no lock is ever stale. On a file system without locks (some
    network file systems) every process acquires it.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._file: int | None = None

    def acquire(self, wait: bool) -> bool:
        """Acquires the lock; returns False if another process has it and `wait` is False.

        Raises `UserError` if the file cannot be created.
        """
        while self._file is None:
            try:
                file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise UserError(f"{self._path}: cannot be written ({one_line(error)})") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return False
            except OSError:  # a file system without locks
                pass
            if self._is_current(file):
                self._file = file
            else:  # the previous holder removed it in the meantime
                os.close(file)
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return True

    def holder(self) -> str:
        """Returns the process that has the lock, from the contents of the file."""
        with contextlib.suppress(OSError):
            return self._path.read_text(errors="replace").strip() or "another process"
        return "another process"

    def release(self) -> None:
        """Releases the lock if it was acquired."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._file)
            self._file = None

    def _is_current(self, file: int) -> bool:
        """Whether the open file is still the one at the path."""
        try:
            return os.path.samestat(os.fstat(file), self._path.stat())
        except OSError:
            return False


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Waits for the lock on `path` and releases it after the block."""
    lock = FileLock(path)
    lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()
