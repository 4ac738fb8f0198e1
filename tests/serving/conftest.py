"""A server of tiny models on a real socket, in this process: one for all tests of a module."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn

import difflm_jax
from difflm_jax.serving.app import Server
from difflm_jax.serving.engine import Engine
from difflm_jax.serving.options import ServeOptions
from tests.tiny_checkpoint import save_tiny_model


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def tiny_lm(tiny_dir):
    return difflm_jax.load(tiny_dir, attention="full", dtype="float32")


@contextlib.contextmanager
def serving(engine: Any, server: type[Server] = Server, **options: Any) -> Iterator[httpx.Client]:
    """Yields a client of a server of `engine`; its `base_url` is the server's."""
    listener = socket.create_server(("127.0.0.1", 0))
    with engine as running:
        served = server(running, ServeOptions(**{"max_new_tokens": 16, "max_length": 256, **options}))
        uvicorned = uvicorn.Server(uvicorn.Config(served.app(), log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=uvicorned.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not uvicorned.started:
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=120) as client:
            client.engine = running
            yield client
        uvicorned.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(tiny_lm) -> Iterator[httpx.Client]:
    """A server of a model that fills masks and of its causal base."""
    with serving(Engine({"tiny": tiny_lm, "tiny:base": tiny_lm.base()})) as found:
        yield found


@pytest.fixture(scope="session")
def wait() -> Callable[[Callable[[], bool]], None]:
    def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.02)

    return until
