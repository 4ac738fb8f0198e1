"""Weights & Biases beside `metrics.jsonl`: a convenience that never stops a run."""

import datetime
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from difflm_jax.errors import one_line

_HOST = "api.wandb.ai"


class Tracker:
    """One W&B run, or nothing: with an empty project, or after the first failure, every call does nothing.

    `wandb_config.mode`: "online", "offline", "disabled", or "auto", which is offline where no API key is found, so that
    a run never waits for a login. What is chosen, and a failure, is said once.
    """

    def __init__(self, config: Any):
        settings = config.wandb_config
        mode = _mode(settings.mode)
        self._run = None
        if not settings.project or mode == "disabled":
            return
        prefix = "debug-" if config.debug else ""
        if mode == "offline":
            print(f"wandb: offline, into {settings.wandb_log_path} (upload with `wandb sync`)", flush=True)

        def start() -> Any:
            Path(settings.wandb_log_path).mkdir(parents=True, exist_ok=True)
            return wandb.init(
                project=prefix + settings.project,
                entity=settings.entity or None,
                name=f"{prefix}{settings.project}-{datetime.datetime.now():%Y-%m-%d-%H-%M-%S}",
                config=config.to_dict(),
                dir=settings.wandb_log_path,
                mode=mode,
                settings=wandb.Settings(silent=True, init_timeout=60),
            )

        self._run = self._guarded(start)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Logs numbers under the step of their phase, which is in `values` too: W&B's own step counts calls."""
        self._call(lambda run: run.log({**values, "phase_step": step}))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Logs a table."""
        self._call(
            lambda run: run.log(
                {name: wandb.Table(columns=list(columns), data=[list(row) for row in rows]), "phase_step": step}
            )
        )

    def finish(self) -> None:
        """Ends the run."""
        self._call(lambda run: run.finish())
        self._run = None

    def _call(self, action: Callable[[Any], Any]) -> None:
        if self._run is not None:
            self._guarded(lambda: action(self._run))

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """Runs `action`; whatever it raises is said once and ends tracking, never the training."""
        try:
            return action()
        except Exception as error:  # a tracker may fail in any way: network, disk, quota, its own defects
            print(f"wandb: off from here on ({one_line(error)}); metrics.jsonl goes on", flush=True)
            self._run = None
            return None


def _mode(wanted: str) -> str:
    """What "auto" means here: the environment's WANDB_MODE, else online with an API key, else offline."""
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc() else "offline"


def _in_netrc() -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False  # no such file, or one that wandb could not read either
