"""`difflm serve` as a process: curl, `transformers chat`, and a SIGTERM while it answers."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

import difflm_jax
from difflm_jax import serve
from difflm_jax.cli import run_command
from tests.serving.test_engine import adapter_of

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}


@pytest.fixture(scope="module")
def process(tiny_dir):
    """(process, url) of a server that was given port 0."""
    words = ["--model", str(tiny_dir), "--dtype=float32", "--port=0", "--max_new_tokens=8", "--max_length=200"]
    with subprocess.Popen(
        [sys.executable, "-m", "difflm_jax.serve", *words], stderr=subprocess.PIPE, text=True, cwd=tiny_dir
    ) as started:
        for line in started.stderr:
            if found := re.search(r"serving (\S+) at (http://127\.0\.0\.1:\d+)/v1", line):
                break
        threading.Thread(target=started.stderr.read, daemon=True).start()
        yield started, found[2]
        started.kill()


def said(capsys, *words: str) -> str:
    assert run_command(serve.main, serve.FLAGS, "", ["serve", *words]) == 1
    return capsys.readouterr().err


@pytest.mark.slow
def test_curl_chats_and_streams(process):
    """Proves with the real curl that the plainest client gets answers, streams and errors."""
    if not shutil.which("curl"):
        pytest.skip("no curl here")
    _, url = process
    json_body = ["-H", "Content-Type: application/json", "-d", json.dumps(CHAT)]
    curl = ["curl", "--silent", "--max-time", "100", f"{url}/v1/chat/completions", *json_body[:3]]
    answer = json.loads(subprocess.run([*curl, json_body[3]], capture_output=True, check=True).stdout)
    streamed = json.dumps({**CHAT, "stream": True})
    lines = subprocess.run([*curl, streamed], capture_output=True, check=True, text=True).stdout.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert lines[-2:] == ["data: [DONE]", ""]
    assert content == answer["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_transformers_chat_talks_to_it(process, tmp_path):
    """Proves that transformers' own chat client loads the model, streams an answer and sends its generation flags."""
    tool = Path(sys.executable).with_name("transformers")
    if not tool.exists():
        pytest.skip("no `transformers` command here")
    _, url = process
    name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    answer = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "temperature": 0}, timeout=100).json()
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    environment.pop("HF_HUB_OFFLINE", None)  # under which this client reaches no server at all, not even a local one
    done = subprocess.run(
        [tool, "chat", name, f"{url}/v1", "max_new_tokens=8", "do_sample=False"],
        input="Hi\nn\n!exit\n", capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Generation stopped after reaching the token limit" in done.stdout  # the reason is the true one; n: no more
    assert f"<{name}>" in done.stdout and "Traceback" not in done.stderr
    shown = [c for c in answer["choices"][0]["message"]["content"] if c.isalnum()]
    assert all(c in done.stdout for c in shown)


@pytest.mark.slow
def test_sigterm_lets_a_running_stream_end(process):
    """Proves that started requests are answered to the end, and that no new ones are accepted."""
    started, url = process
    body = {**CHAT, "max_tokens": 150, "stream": True, "diffusion": {"drafts": True}}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=100) as stream:
        lines = stream.iter_lines()
        while "draft" not in next(lines):
            pass
        started.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"error"' not in rest[-2]
    assert started.wait(60) == -signal.SIGTERM
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_adapters_of_one_base_are_models_over_one_copy_of_its_weights(tiny_dir, tiny_lm, tmp_path):
    for seed, name in enumerate(("a", "b")):
        tiny_lm.with_adapter(*adapter_of(tiny_lm, seed)).save_adapter(tmp_path / name)
    flags = copy.deepcopy(serve.FLAGS)
    flags(
        [
            "serve",
            f"--model={tiny_dir}",
            "--dtype=float32",
            f"--adapter={tmp_path / 'a'}",
            f"--adapter=other={tmp_path / 'b'}",
        ]
    )
    models = serve._load(flags)
    assert list(models) == ["a", "other", "tiny"]
    assert models["a"].params is models["other"].params
    assert models["tiny"].attention == "causal" and models["tiny"].lora is None
    given = {"max_new_tokens": 8, "steps": 8}
    for name, directory in (("a", "a"), ("other", "b")):
        alone = difflm_jax.load(tiny_dir, adapter=tmp_path / directory, dtype="float32")
        assert models[name].generate("Hi", **given).texts == alone.generate("Hi", **given).texts
    flags = copy.deepcopy(serve.FLAGS)
    flags(["serve", f"--model={tiny_dir}", "--dtype=float32", "--causal"])
    assert {name: lm.attention for name, lm in serve._load(flags).items()} == {"tiny": "causal"}


def test_flags_that_cannot_be_served_with_are_one_line(capsys, tiny_dir, tmp_path):
    assert "name a model with --model" in said(capsys)
    assert "--rows=0: must be greater than 0" in said(capsys, "--model=x", "--rows=0")
    assert "give --adapter or --run, not both" in said(capsys, "--model=x", "--run=a", "--adapter=b")
    assert "two adapters of one name" in said(
        capsys, f"--model={tiny_dir}", "--port=0", "--adapter=a=x", "--adapter=a=y"
    )
    assert "chat_template: is not a Jinja template" in said(
        capsys, f"--model={tiny_dir}", "--port=0", "--chat_template={% if %}"
    )
    assert "threshold must be in (0, 1]" in said(capsys, f"--model={tiny_dir}", "--port=0", "--threshold=7")


def test_a_port_in_use_is_said_before_the_model_is_read(capsys, tiny_dir):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port={port}: Address already in use" in said(capsys, f"--model={tiny_dir}/no", f"--port={port}")


def test_a_model_that_will_not_fit_is_refused_before_its_weights_are_read(capsys, tiny_dir, monkeypatch):
    monkeypatch.setattr("difflm_jax.planning.fit.free_bytes", lambda: 1000)
    message = said(capsys, f"--model={tiny_dir}", "--port=0")
    assert "will not fit: needs" in message and "--nocheck_fit loads it all the same" in message
