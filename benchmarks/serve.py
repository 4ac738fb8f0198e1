"""A server under load: `difflm serve`, sequential calls of `generate`, and `transformers serve`.

    python benchmarks/serve.py --model=models/SmolLM2-135M-Instruct.Q4_1.gguf [--adapter=DIR] [--peer=DIR]

Without `--adapter` the causal base is served. `--peer` is the base as a Hugging Face checkpoint, for transformers
(`load(...).base().save_pretrained(DIR)` writes one; `pip install 'transformers[serving]'`). Each client sends one
request after another, streamed, until `--requests` are answered. The ways take turns. Printed for each: tokens per
second of all clients together, seconds to the first text and to the end of a request (median and 95th percentile).
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
from common import add_report_flags, machine, report

import difflm_jax

QUESTIONS = (
    "What is the capital of Italy, and what is it known for?",
    "Name three animals that live in the sea.",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about rain.",
    "How do I boil an egg?",
    "Give me a name for a black cat, and say why.",
    "What is a prime number?",
    "List the days of the week.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--adapter", default="", help="a PEFT directory; without one the causal base is served")
    parser.add_argument("--peer", default="", help="the base as a checkpoint, for transformers serve")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--clients", default="1,4,8")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("--steps", type=int, default=0, help="forward passes of a diffusion model; 0: one per token")
    add_report_flags(parser, rounds=2)
    options = parser.parse_args()
    counts = [int(count) for count in options.clients.split(",")]
    facts = {**machine(), "requests": options.requests, "tokens": options.tokens}
    lm = difflm_jax.load(
        options.model, adapter=options.adapter or None, causal=not options.adapter, dtype=options.dtype
    )
    with contextlib.ExitStack() as stack:
        servers = {"difflm serve": stack.enter_context(_ours(options))}
        if options.peer:
            servers["transformers serve"] = stack.enter_context(_theirs(options))
        ways = {"generate, one after another": lambda: _generated(lm, options)}
        for name, (url, model) in servers.items():
            for count in counts:
                ways[f"{name}, {count} clients"] = lambda at=(url, model), n=count: _served(at, n, lm, options)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        for number in range(-1, options.rounds):  # the first round compiles
            for name, way in ways.items():
                figures = way()
                print(f"round {number}: {name}: {_summary([figures])}", flush=True)
                if number >= 0:
                    found[name].append(figures)
    rows = [{"way": name, **_summary(rounds)} for name, rounds in found.items()]
    report("serve", options, rows, "tokens/s", facts)


def _generated(lm: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Answers the same requests without a server."""
    start, tokens, seconds = time.perf_counter(), 0, []
    for number in range(options.requests):
        began = time.perf_counter()
        prompt = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
        out = lm.generate([prompt], options.tokens, options.steps or options.tokens)
        tokens += _count(lm, out.texts[0])
        seconds.append(time.perf_counter() - began)
    return {"rate": tokens / (time.perf_counter() - start), "first": [], "whole": seconds}


def _served(at: tuple[str, str], clients: int, lm: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Sends the requests from `clients` threads to the model at (url, name)."""
    start, (url, model) = time.perf_counter(), at
    with httpx.Client(base_url=url, timeout=300) as client, concurrent.futures.ThreadPoolExecutor(clients) as pool:
        ask = [pool.submit(_asked, client, model, number, options) for number in range(options.requests)]
        answers = [future.result() for future in ask]
    seconds = time.perf_counter() - start
    first, whole, texts = zip(*answers, strict=True)
    return {"rate": sum(_count(lm, text) for text in texts) / seconds, "first": list(first), "whole": list(whole)}


def _asked(client: httpx.Client, model: str, number: int, options: argparse.Namespace) -> tuple[float, float, str]:
    """Sends a streamed request; returns (seconds to the first text, seconds to the end, the text)."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
        "max_tokens": options.tokens,
        "temperature": 0,
        "stream": True,
    }
    if options.steps:
        body["diffusion"] = {"steps": options.steps}
    start, first, text = time.perf_counter(), None, ""
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"error: {answer.status_code} {answer.read().decode()[:500]}")
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise SystemExit(f"error: {chunk['error']}")
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
            first = first or (time.perf_counter() - start if text else None)
    whole = time.perf_counter() - start
    return first or whole, whole, text


def _count(lm: Any, text: str) -> int:
    """Counts the tokens of an answer, in the same way for all servers."""
    return len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def _summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, whole = (np.array([x for figures in rounds for x in figures[name]]) for name in ("first", "whole"))
    rates = [figures["rate"] for figures in rounds]
    figures = {"tokens/s": round(statistics.median(rates), 1), "lowest": round(min(rates), 1)}
    if len(first):
        figures |= {"first p50 s": round(float(np.median(first)), 2), "first p95 s": _p95(first)}
    return {**figures, "whole p50 s": round(float(np.median(whole)), 2), "whole p95 s": _p95(whole)}


def _p95(seconds: np.ndarray) -> float:
    return round(float(np.percentile(seconds, 95)), 2)


@contextlib.contextmanager
def _ours(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    port = _free_port()
    given = [f"--model={options.model}", f"--dtype={options.dtype}", f"--port={port}"]
    given += [f"--adapter={options.adapter}"] if options.adapter else ["--causal"]
    command = [sys.executable, "-m", "difflm_jax.serve", *given]
    with _running(command, f"http://127.0.0.1:{port}", "/v1/models") as url:
        yield url, httpx.get(f"{url}/v1/models").json()["data"][0]["id"]


@contextlib.contextmanager
def _theirs(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    port = _free_port()
    given = ["serve", options.peer, "--port", str(port), "--device", "cpu", "--dtype", options.dtype]
    command = [sys.executable, "-c", "import sys; from transformers.cli.transformers import main; sys.exit(main())"]
    with _running([*command, *given], f"http://127.0.0.1:{port}", "/health") as url:
        yield url, options.peer


@contextlib.contextmanager
def _running(command: list[str], url: str, path: str) -> Iterator[str]:
    """Runs a server that answers at `path` until the block ends."""
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}{path}").status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
