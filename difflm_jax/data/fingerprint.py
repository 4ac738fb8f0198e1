"""Hashes of data files. A large file is read whole once; later runs recognise it by its size, times and samples."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

_SMALL = 8 << 20  # bytes up to which a file is always read whole
_SAMPLE, _SAMPLES = 64 << 10, 8  # bytes per sample, and samples spread over the file
_SETTLED = 10.0  # seconds since the last change: for a younger file, the next change might not alter its times


def file_hash(path: Path) -> str:
    """Returns a hash of the content of `path`. Raises `OSError` if it cannot be read."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size <= _SMALL:
            return hashlib.file_digest(file, "blake2b").hexdigest()
        samples = hashlib.blake2b(digest_size=16)
        for number in range(_SAMPLES):
            file.seek((status.st_size - _SAMPLE) * number // (_SAMPLES - 1))
            samples.update(file.read(_SAMPLE))
        facts = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, samples.hexdigest()]
        known = _folder() / hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
        with contextlib.suppress(OSError):
            return known.read_text()
        file.seek(0)
        found = hashlib.file_digest(file, "blake2b").hexdigest()
    if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED:
        _keep(known, found)
    return found


def _folder() -> Path:
    """The cache folder of `datasets`, found without importing it, which takes a second."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser() / "difflm_jax_files"


def _keep(known: Path, found: str) -> None:
    with contextlib.suppress(OSError):  # the cache only saves time
        known.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=known.parent)
        with os.fdopen(descriptor, "w") as file:
            file.write(found)
        Path(name).replace(known)
