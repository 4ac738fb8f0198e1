"""C++ functions for XLA on CPUs: built once with the machine's compiler and stored in the user's cache directory."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from difflm_jax.utils.compilation import own_directory

SWITCH = "DIFFLM_NATIVE"  # environment variable; "0": nothing is built, XLA computes everything
COMPILERS = ("g++", "clang++", "c++")
SECONDS = 300  # time limit of a build
FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-ffp-contract=fast", "-w", "-shared", "-fPIC")


@functools.cache
def has_native(source: Path, functions: tuple[str, ...]) -> bool:
    """Returns whether XLA can call `functions` of the C++ file `source`. Builds and registers them if needed.

    Returns False without a compiler, without a writable cache directory, or with DIFFLM_NATIVE=0. A failed build prints
    one line.
    """
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if os.environ.get(SWITCH) == "0" or os.name != "posix" or compiler is None:
        return False
    try:
        library = ctypes.CDLL(str(_built(source, compiler)))
        addresses = [getattr(library, function) for function in functions]
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)  # bytes if the compiler was stopped
        lines = (said if isinstance(said, str) else said.decode(errors="replace")).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else "unknown")
        print(f"note: {source.name} was not built, XLA computes instead ({reason})", file=sys.stderr)
        return False
    for function, address in zip(functions, addresses, strict=True):
        jax.ffi.register_ffi_target(function, jax.ffi.pycapsule(address), platform="cpu")
    return True


def _built(source: Path, compiler: str) -> Path:
    """Returns the shared library of `source` for this processor, compiler and jaxlib; builds it if it is not cached."""
    version = _said([compiler, "--version"], 60)
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    described = [*texts, version, *FLAGS, jax.lib.__version__]
    name = hashlib.blake2b("\0".join(described).encode(), digest_size=12).hexdigest()
    library = own_directory("native") / f"{source.stem}-{name}.so"
    if library.is_file():
        return library
    print(f"building {source.name} for this processor, once (a few seconds)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        made = Path(directory) / library.name
        command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(made)]
        _said(command, SECONDS)
        made.replace(library)  # atomic, even if another process builds it too
    return library


def _said(command: list[str], seconds: float) -> str:
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=seconds)
    return run.stdout
