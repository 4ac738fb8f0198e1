"""Cost as work grows: curves against length, rows, layers, devices, rows of data, and adapters that are served.

    python -m benchmarks.growth [--only=length,data] [--out=DIR]

    length    tokens/s of a training step, and of a cached pass of one new token per row, from 128 to 8,192 tokens
    rows      tokens/s of a cached pass from 1 to 128 rows, and of a training step from 1 to 64 rows
    layers    tokens/s times layers of a training step, and seconds to compile it, from 2 to 32 layers
    devices   tokens/s of a training step of eight rows over 1 to 8 virtual devices of this machine
    data      seconds from stored rows to the first batch, batches/s, and memory, from 10^4 to 10^7 rows
    tokenise  rows/s from JSONL to stored rows, from 10^3 to 3 * 10^4 rows
    adapters  tokens/s of eight requests at once, to 1 to 16 adapters of one base

The model is small and has random weights (`--width`): only the change of a figure counts, not its size. `ratio` is a
figure relative to the one before it. Each part runs in its own process, so that none keeps memory of another.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 2
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
LEAST_TOKENS = 2048  # of a training step, so that short lengths do not measure its fixed cost
DATA_ROWS, TOKENS_OF_A_ROW = (10**4, 10**5, 10**6, 10**7), 12
Point = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts, separated by commas")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)  # one part, in this process
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=180, help="seconds of a process, after which its points count")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct.Q4_1.gguf", help="whose tokenizer")
    parser.add_argument("--out", default="", help="directory for growth.json and growth.png")
    options = parser.parse_args()
    if options.part:
        for point in PARTS[options.part][0](options):
            print("POINT " + json.dumps(point), flush=True)
        return
    curves: dict[str, list[Point]] = {}
    for part in [part for part in options.only.split(",") if part] or PARTS:
        _, sizes, figures = PARTS[part]
        begun, points = time.perf_counter(), []
        for size in sizes:
            points += _in_own_process(part, size, options)
        for name, unit in figures.items():
            curve = [point for point in points if name in point]
            curves[f"{part}: {unit}"] = [{"at": point["at"], "value": point[name]} for point in curve]
            _show(part, unit, curves[f"{part}: {unit}"])
        print(f"{part}: {time.perf_counter() - begun:.0f} s\n", flush=True)
    if options.out:
        _keep(Path(options.out), curves)


def _in_own_process(part: str, size: int, options: argparse.Namespace) -> list[Point]:
    flags = [f"--part={part}", f"--size={size}", f"--width={options.width}", f"--model={options.model}"]
    environment = dict(os.environ)
    if part == "devices":
        flag = f"--xla_force_host_platform_device_count={size}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} {flag}"}
    command = [sys.executable, "-m", "benchmarks.growth", *flags]
    points = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        timer = threading.Timer(options.limit, process.kill)
        timer.start()
        for line in process.stdout:
            if line.startswith("POINT "):
                points.append(json.loads(line[6:]))
        timer.cancel()
    if process.returncode:
        print(f"{part}: ended with status {process.returncode}, at most {options.limit} s: {len(points)} points kept")
    return points


def _show(part: str, unit: str, curve: list[Point]) -> None:
    print(f"{part}: {unit}")
    for before, point in zip([None, *curve], curve, strict=False):
        ratio = "" if before is None or not before["value"] else f"{point['value'] / before['value']:8.2f}"
        print(f"  {point['at']:>12,}{point['value']:>14,.4g}{ratio}", flush=True)


def _keep(directory: Path, curves: dict[str, list[Point]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from benchmarks.common import machine

    directory.mkdir(parents=True, exist_ok=True)
    record = json.dumps({"machine": machine(), "curves": curves}, indent=2)
    (directory / "growth.json").write_text(record + "\n", encoding="utf-8")
    columns = 3
    lines = -(-len(curves) // columns)
    fig, grid = pyplot.subplots(lines, columns, figsize=(4 * columns, 2.6 * lines), layout="constrained", squeeze=False)
    for axes, (name, curve) in zip(grid.flat, curves.items(), strict=False):
        axes.plot([point["at"] for point in curve], [point["value"] for point in curve], marker="o")
        axes.set_xscale("log", base=10 if name.startswith(("data", "tokenise")) else 2)
        axes.set_ylim(bottom=0)
        axes.set_title(name, fontsize=9)
    for axes in list(grid.flat)[len(curves) :]:
        axes.set_visible(False)
    fig.savefig(directory / "growth.png", dpi=110)
    pyplot.close(fig)


def model_config(width: int, layers: int, vocabulary: int = 8192) -> dict[str, Any]:
    """Returns the `config.json` of the model."""
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": width,
        "intermediate_size": 3 * width, "num_hidden_layers": layers, "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 128), "head_dim": 64, "vocab_size": vocabulary, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "max_position_embeddings": 16_384, "tie_word_embeddings": True, "hidden_act": "silu",
        "attention_bias": False,
    }  # fmt: skip


def _seconds(run: Callable[[], Any], rounds: int = ROUNDS, warm_up: int = 1) -> float:
    """Returns the median seconds of `rounds` runs, after `warm_up` runs that compile."""
    from benchmarks.common import alternating, median_of

    return median_of(alternating({"": lambda _: run()}, rounds, warm_up)[""])


def _train(options: argparse.Namespace, rows: int, length: int, layers: int = 4) -> tuple[float, float]:
    """Returns (seconds of a LoRA step over `rows` full rows, seconds to compile it)."""
    import jax
    import jax.numpy as jnp

    from benchmarks.accelerator import full_rows, random_params
    from benchmarks.figures import SETTINGS, configuration
    from difflm_jax.checkpoint.source import read_model_config
    from difflm_jax.config.files import lora_config
    from difflm_jax.distributed.mesh import make_mesh
    from difflm_jax.distributed.sharding import batch_sharding, place
    from difflm_jax.models.lora import init_lora
    from difflm_jax.planning.jobs import training_job
    from difflm_jax.training.optimizer import make_optimizer
    from difflm_jax.training.step import TrainState

    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(model_config(options.width, layers)))
        given = argparse.Namespace(model=directory, length=length, rows=rows)
        config = configuration(given, {**SETTINGS, "attention_kernel": "xla", "dtype": "float32", "loss_chunk": 256})
        shape = read_model_config(directory)
    mesh = make_mesh(-1)
    begun = time.perf_counter()
    step = training_job(config, "pretrain", shape, mesh, rows).lower().compile()
    compiled = time.perf_counter() - begun
    params = random_params(shape, jnp.float32, None)
    lora = init_lora(jax.random.key(1), params, lora_config(config), jnp.zeros(shape.hidden_size))
    state = TrainState({"lora": lora}, make_optimizer(config).init({"lora": lora}))
    known = {"frozen": {"params": params}, "key": jax.random.key(0), "index": jnp.int32(0)}
    known, state = place(known, mesh), place(state, mesh)
    batch = jax.device_put(full_rows(given, shape.vocab_size), batch_sharding(mesh))

    def one() -> Any:
        nonlocal state
        state, metrics = step(**known, state=state, batch=batch)
        return metrics

    return _seconds(one), compiled


def _pass(options: argparse.Namespace, rows: int, columns: int) -> float:
    """Returns the seconds of a cached causal pass of one token per row."""
    import jax
    import jax.numpy as jnp

    from benchmarks.accelerator import random_params
    from difflm_jax.models.config import ModelConfig
    from difflm_jax.models.transformer import Transformer
    from difflm_jax.sampling.columns import ColumnModel, Rows

    shape = ModelConfig.from_hf(model_config(options.width, 4))
    variables = {"params": random_params(shape, jnp.float32, None)}
    model = Transformer(shape, None, shape.vocab_size - 1, jnp.float32, on_cpu=jax.default_backend() == "cpu")
    kept = jnp.zeros((4, rows, shape.num_kv_heads, columns, shape.head_dim))
    cache = {"layers": {"self_attn": {"k": kept, "v": kept}}}
    lengths = jnp.full(rows, columns, jnp.int32)
    asked = Rows(jnp.ones((rows, 1), jnp.int32), lengths[:, None], jnp.ones((rows, 1, 1), bool), lengths)
    run = jax.jit(lambda variables, cache, asked: ColumnModel(model, variables).predict(cache, asked)[0].argmax(-1))
    return _seconds(lambda: run(variables, cache, asked), 15)


def by_length(options: argparse.Namespace) -> Iterator[Point]:
    for length in LENGTHS:
        yield {"at": length, "decode": 8 / _pass(options, 8, length)}
    for length in LENGTHS:
        rows = max(1, LEAST_TOKENS // length)
        yield {"at": length, "train": rows * length / _train(options, rows, length)[0]}


def by_rows(options: argparse.Namespace) -> Iterator[Point]:
    for rows in (1, 2, 4, 8, 16, 32, 64, 128):
        yield {"at": rows, "decode": rows / _pass(options, rows, 256)}
    for rows in (1, 4, 16, 64):
        yield {"at": rows, "train": 128 * rows / _train(options, rows, 128)[0]}


def by_layers(options: argparse.Namespace) -> Iterator[Point]:
    for layers in (2, 4, 8, 16, 32):
        seconds, compiled = _train(options, 4, 128, layers)
        yield {"at": layers, "train": 4 * 128 * layers / seconds, "compile": compiled}


def by_devices(options: argparse.Namespace) -> Iterator[Point]:
    yield {"at": options.size, "train": 8 * 128 / _train(options, 8, 128)[0]}


def by_data(options: argparse.Namespace) -> Iterator[Point]:
    """Times the path from stored rows of random lengths to batches, as in training."""
    import datasets

    from difflm_jax.data.batches import batches, describe, plan_batches, split
    from difflm_jax.data.packing import BatchOptions
    from difflm_jax.training.resume import describe_data

    count = options.size
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.arrow"
        subprocess.run([sys.executable, "-c", _WRITE, str(path), str(count), str(TOKENS_OF_A_ROW)], check=True)
        before, point = _memory(), {"at": count}
        begun = time.perf_counter()
        train, held_out = split(datasets.Dataset.from_file(str(path)), 0.01, 42)
        describe(train)
        describe_data(train, held_out)
        point["open"] = time.perf_counter() - begun
        for batching in ("rows", "packed"):
            begun = time.perf_counter()
            plan = plan_batches(train, BatchOptions(16, 64, batching=batching))
            found = batches(train, plan, epochs=2)
            found[0]
            point[f"first {batching}"] = time.perf_counter() - begun
            steps = np.random.default_rng(0).integers(0, plan.steps_per_epoch, 50)
            begun = time.perf_counter()
            for step in steps.tolist():
                found[step]
            point[f"batches {batching}"] = 50 / (time.perf_counter() - begun)
        point["memory"] = _memory() - before
    yield point


# Writes the stored form of `argv[2]` rows, in a separate process so that its memory is not counted.
_WRITE = """
import sys
import numpy as np, pyarrow as pa
from difflm_jax.data.tokenised import _SCHEMA
path, count, mean = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng, done = np.random.default_rng(0), 0
with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
    while done < count:
        n = min(1000, count - done)
        lengths = rng.integers(2, 2 * mean - 1, n).astype(np.int32)
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = pa.array(rng.integers(10, 8000, ends[-1]).astype(np.int32))
        answers = pa.array(np.ones(ends[-1], bool))
        ids = np.arange(done, done + n)
        columns = [pa.ListArray.from_arrays(ends, tokens), pa.ListArray.from_arrays(ends, answers), pa.array(lengths),
                   pa.array(np.zeros(n, np.int32)), pa.array(lengths), pa.array(ids * 7919), pa.array(ids.astype(str))]
        writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        done += n
"""


def _memory() -> float:
    """Returns the peak memory of this process in MiB, without file-backed pages."""
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def by_tokenising(options: argparse.Namespace) -> Iterator[Point]:
    import difflm_jax
    from difflm_jax.data.examples import Options
    from difflm_jax.data.tokenised import tokenize

    tokenizer = difflm_jax.load(options.model).tokenizer
    for count in (10**3, 10**4, 3 * 10**4):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "rows.jsonl")
            with path.open("w", encoding="utf-8") as file:
                for i in range(count):
                    turns = [("user", f"What is {i} + {i}?"), ("assistant", f"{i} + {i} is {2 * i}.")]
                    messages = [{"role": role, "content": content} for role, content in turns]
                    file.write(json.dumps({"messages": messages}) + "\n")
            begun = time.perf_counter()
            tokenize(str(path), tokenizer, Options("sft", 256), directory)
            yield {"at": count, "rate": count / (time.perf_counter() - begun)}


def by_adapters(options: argparse.Namespace) -> Iterator[Point]:
    """Times eight requests at once, spread over the adapters, each of rank 16 on all projections."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    import difflm_jax
    from benchmarks.load import write_checkpoint
    from difflm_jax.models.lora import LoraConfig, init_lora
    from difflm_jax.sampling.options import sampling_options
    from difflm_jax.serving.engine import Engine
    from difflm_jax.serving.requests import Request

    with tempfile.TemporaryDirectory() as directory:
        tokenizer = difflm_jax.load(options.model).tokenizer
        tokenizer.save_pretrained(directory)
        write_checkpoint(Path(directory), model_config(options.width, 4, len(tokenizer)))
        base = difflm_jax.load(directory, attention="block", block_length=8, dtype="float32")
    lora_config = LoraConfig()
    sampling = sampling_options("block", "probability", {"stop_at_eos": False})
    for count in (1, 4, 16):
        lms = {}
        for number in range(count):
            lora = init_lora(jax.random.key(number), base.params, lora_config, jnp.zeros(options.width))
            model = base.model.clone(lora=lora_config)
            lms[f"adapter-{number}"] = dataclasses.replace(base, model=model, lora=lora)
        with Engine(lms) as engine:

            def eight(engine: Engine = engine, count: int = count) -> None:
                prompts = np.random.default_rng(0).integers(100, 8000, (8, 24)).astype(np.int32)
                asked = [
                    Request(f"adapter-{i % count}", tokens, sampling, max_new_tokens=64, steps=32)
                    for i, tokens in enumerate(prompts)
                ]
                for ticket in [engine.submit(request) for request in asked]:
                    ticket.result()

            yield {"at": count, "rate": 8 * 64 / _seconds(eight, warm_up=3)}


# name -> (its points, the sizes that each have a process of their own, {figure: what it is})
PARTS: dict[str, tuple[Callable[[argparse.Namespace], Iterator[Point]], tuple[int, ...], dict[str, str]]] = {
    "length": (by_length, (0,), {"train": "training, tokens/s", "decode": "decoding 8 rows, tokens/s"}),
    "rows": (by_rows, (0,), {"decode": "decoding, tokens/s", "train": "training, tokens/s"}),
    "layers": (by_layers, (0,), {"train": "training, tokens/s times layers", "compile": "compilation, s"}),
    "devices": (by_devices, (1, 2, 4, 8), {"train": "training, tokens/s"}),
    "data": (
        by_data,
        DATA_ROWS,
        {
            "open": "open, split, describe and digest, s",
            "first rows": "plan and first batch, s",
            "batches rows": "batches/s at random steps",
            "first packed": "plan and first batch, packed, s",
            "batches packed": "packed batches/s at random steps",
            "memory": "memory, MiB",
        },
    ),
    "tokenise": (by_tokenising, (0,), {"rate": "rows/s"}),
    "adapters": (by_adapters, (0,), {"rate": "eight requests, tokens/s"}),
}


if __name__ == "__main__":
    main()
