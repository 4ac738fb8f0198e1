"""Compiled programs on disk: the second run of a command reuses what the first compiled."""

import errno
import hashlib
import os
import platform
from pathlib import Path

import jax

MAX_BYTES = 4 << 30  # beyond this, the least recently used programs are removed
MIN_SECONDS = 0.2  # programs that compile faster are not stored


def keep_compiled() -> None:
    """Turns JAX's persistent compilation cache on, in the user's own cache directory.

    `JAX_COMPILATION_CACHE_DIR` names another directory; `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off. The
    cache contains code that will run, so other users must not be able to write to it. Each kind of processor has its
    own directory, because CPU programs use every feature of the processor that compiled them. If the directory cannot
    be used, a line is printed.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    try:
        directory = own_directory("compiled")
    except OSError as error:
        print(f"compiled programs are not kept: {error.filename} cannot be used ({error.strerror})", flush=True)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def own_directory(name: str) -> Path:
    """Creates and returns a directory for this kind of processor that only the user can access. Raises `OSError`."""
    directory = _path(name)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and directory.stat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it belongs to another user", str(directory))
    directory.chmod(0o700)
    return directory


def _path(name: str) -> Path:
    named = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        caches = Path(named).expanduser()
    except RuntimeError:  # a user without a home, as in some containers
        raise OSError(errno.ENOENT, "there is no home directory: set XDG_CACHE_HOME", named) from None
    return caches / "difflm_jax" / name / _processor()


def _processor() -> str:
    """Returns a short hash of the kind of processor, including its features if the system lists them."""
    described = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        described += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return hashlib.blake2b(described.encode(), digest_size=6).hexdigest()
