"""Serves a converted model over OpenAI's API, with a web page to chat and to watch it denoise.

    python -m difflm_jax.serve --model=SOURCE [--adapter=DIR | --adapter=NAME=DIR ... | --run=DIR]
                               [--host=127.0.0.1 --port=8000 --api_key=...]

OpenAI clients connect to http://127.0.0.1:8000/v1, browsers to http://127.0.0.1:8000. Adapters of one base, and the
causal base itself, are separate models. Decoding flags are defaults that a request may override. The key may also be
set in the environment, as DIFFLM_API_KEY.
"""

import dataclasses
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from difflm_jax.cli import (
    check_names_a_model,
    define_sampling_flags,
    define_source_flags,
    run_command,
    sampling_flags,
    suggest_next,
    with_template,
)
from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.loading import open_model, spec_of_names
from difflm_jax.planning.fit import check_fit
from difflm_jax.sampling.options import sampling_options

_LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")

FLAGS = flags.FlagValues()
define_source_flags(FLAGS)
flags.DEFINE_multi_string(
    "adapter", [], "PEFT adapter directory, or NAME=DIR; may be given often: each is a model", flag_values=FLAGS
)
flags.DEFINE_bool("causal", False, "Serve the causal base alone.", flag_values=FLAGS)
flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: every one.", flag_values=FLAGS)
flags.DEFINE_integer("port", 8000, "Port to listen on; 0: a free one.", flag_values=FLAGS)
flags.DEFINE_string("api_key", "", "Asked of every request, but for /health.", flag_values=FLAGS)
flags.DEFINE_integer("rows", 8, "Requests decoded together.", flag_values=FLAGS)
flags.DEFINE_integer("queue", 64, "Requests that may wait; further ones are told to come later.", flag_values=FLAGS)
flags.DEFINE_integer("cache_mib", 512, "Memory for shared beginnings of prompts, in MiB.", flag_values=FLAGS)
flags.DEFINE_bool("warmup", False, "Compile before the first request.", flag_values=FLAGS)
flags.DEFINE_integer("max_new_tokens", 256, "Answer of a request that names no length.", flag_values=FLAGS)
flags.DEFINE_integer("max_length", 4096, "Tokens of prompt and answer together, at most.", flag_values=FLAGS)
flags.DEFINE_integer("max_answers", 16, "Answers to one request, at most.", flag_values=FLAGS)
flags.DEFINE_float("time_limit", 300.0, "Seconds of a request, waiting included.", flag_values=FLAGS)
flags.DEFINE_float("drain_seconds", 30.0, "Seconds for running requests after SIGTERM.", flag_values=FLAGS)
flags.DEFINE_integer("steps", None, "Forward passes of a request that names none.", flag_values=FLAGS)
flags.DEFINE_integer("block_length", 0, "Fill answers in blocks of this length (0: one block).", flag_values=FLAGS)
flags.DEFINE_bool("check_fit", True, "Refuse a model that will not fit into memory.", flag_values=FLAGS)
define_sampling_flags(FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    try:
        import uvicorn

        from difflm_jax.serving.app import Server
        from difflm_jax.serving.engine import Engine, EngineOptions
        from difflm_jax.serving.options import ServeOptions
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'difflm_jax[serve]'") from error
    _check(flag_values)
    listener = _listener(flag_values.host, flag_values.port)  # before the weights, so that a port in use fails early
    models = _load(flag_values)
    options = ServeOptions(
        api_key=flag_values.api_key or os.environ.get("DIFFLM_API_KEY", ""),
        hosts=(*_LOOPBACK, flag_values.host.lower()) if flag_values.host in _LOOPBACK else ("*",),
        max_new_tokens=flag_values.max_new_tokens,
        max_length=flag_values.max_length,
        max_answers=flag_values.max_answers,
        time_limit=flag_values.time_limit,
        drain_seconds=flag_values.drain_seconds,
        steps=flag_values.steps,
        block_length=flag_values.block_length or None,
        sampling=sampling_flags(flag_values),
    )
    held = EngineOptions(
        rows=flag_values.rows,
        queue=flag_values.queue,
        cache_bytes=flag_values.cache_mib << 20,
        warmup=flag_values.warmup,
    )
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", force=True)
    logging.getLogger("difflm.serve").setLevel(logging.INFO)
    with Engine(models, held) as engine:
        settings = uvicorn.Config(
            Server(engine, options).app(),
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=int(flag_values.drain_seconds) + 1,
        )
        listener.listen(settings.backlog)  # clients may connect once the next line is printed
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"serving {', '.join(models)} at {url}/v1", file=sys.stderr, flush=True)
        suggest_next(f"open {url} in a browser, or curl {url}/v1/models")
        uvicorn.Server(settings).run(sockets=[listener])


def _check(flag_values: flags.FlagValues) -> None:
    """Raises `UserError` for flags that the server does not support."""
    check_names_a_model(flag_values)
    for name in ("rows", "max_new_tokens", "max_length", "max_answers", "time_limit"):
        if not flag_values[name].value > 0:
            raise UserError(f"--{name}={flag_values[name].value}: must be greater than 0")
    for name in ("queue", "cache_mib", "drain_seconds", "block_length"):
        if flag_values[name].value < 0:
            raise UserError(f"--{name}={flag_values[name].value}: must be at least 0")
    if flag_values.run and flag_values.adapter:
        raise UserError("give --adapter or --run, not both")
    if not 0 <= flag_values.port < 2**16:
        raise UserError(f"--port={flag_values.port}: must be in 0..65535")


def _listener(host: str, port: int) -> socket.socket:
    """Returns a socket bound to the address. Raises `UserError`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: {error.strerror or error}") from error
    return listener


def _load(flag_values: flags.FlagValues) -> dict[str, LanguageModel]:
    """Loads the models by name, the default first: each adapter (or the checkpoint), then the causal base."""
    adapters = dict(map(_named_adapter, flag_values.adapter))
    if len(adapters) < len(flag_values.adapter):
        raise UserError("--adapter: two adapters of one name; write --adapter=NAME=DIR")
    names = ("model", "run", "dtype", "quantization", "revision", "mask_token")
    given = {name: flag_values[name].value for name in names}
    specs = {name: spec_of_names(**given, adapter=directory) for name, directory in adapters.items()}
    specs = specs or {_name_of(flag_values.run or flag_values.model): spec_of_names(**given)}
    opened = {name: with_template(open_model(spec), flag_values) for name, spec in specs.items()}
    first, spec = next(iter(specs.items()))
    for name, lm in opened.items():
        for note in _checked(flag_values, name, lm):
            print(f"note: {note}", file=sys.stderr)
    models = _with_weights(opened, spec.converted)
    base = _name_of(spec.source)
    has_base = spec.origin is None and any(lm.lora is not None or lm.origin is not None for lm in models.values())
    on_base = next((lm for lm in models.values() if lm.origin is None), models[first])
    if flag_values.causal:
        return {base: on_base.base()}
    return models | ({base if base not in models else f"{base}:base": on_base.base()} if has_base else {})


def _with_weights(opened: dict[str, LanguageModel], converted: Path | None) -> dict[str, LanguageModel]:
    """Reads one copy of the weights for all models. A model with a merged adapter (DoRA) has its own copy."""
    models = {name: lm if lm.origin is None else lm.with_weights() for name, lm in opened.items()}
    on_base = [name for name, lm in opened.items() if lm.origin is None]
    params = models[on_base[0]].with_weights(converted).params if on_base else None
    return models | {name: dataclasses.replace(models[name], params=params) for name in on_base}


def _checked(flag_values: flags.FlagValues, name: str, lm: LanguageModel) -> list[str]:
    """Returns notes for the user on an opened model. Raises `UserError` if it cannot be served."""
    notes = []
    if not flag_values.causal:
        sampling_options(lm.attention, lm.algorithm, sampling_flags(flag_values))
        if not (lm.lora or lm.mask_is_trained):
            notes.append(f"{name} was never trained to fill masks: --causal serves it token by token")
    if flag_values.check_fit:
        columns = min(flag_values.max_length, lm.config.max_position_embeddings)
        notes.append(check_fit(lm, flag_values.rows, columns, "--nocheck_fit"))
    return [note for note in notes if note]


def _named_adapter(value: str) -> tuple[str, str]:
    """Parses NAME=DIR, or DIR alone, into (name, directory)."""
    name, equals, directory = value.partition("=")
    if not equals or "/" in name:
        name, directory = _name_of(value), value
    if not name or not directory:
        raise UserError(f"--adapter={value}: write --adapter=DIR or --adapter=NAME=DIR")
    return name, str(Path(directory).expanduser())


def _name_of(source: str) -> str:
    """Returns the name of a model for clients: a whole hub id, else the last part of the path."""
    path = Path(source).expanduser()
    if not path.exists():
        return source
    return path.resolve().name.removesuffix(".gguf")


def command(argv: Sequence[str]) -> int:
    """Runs the command line `argv` and returns the exit status."""
    return run_command(main, FLAGS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(command(sys.argv))
