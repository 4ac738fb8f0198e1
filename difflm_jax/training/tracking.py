"""Weights & Biases beside `metrics.jsonl`: a convenience that never stops a run."""

import datetime
import netrc
import os
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from difflm_jax.errors import one_line

_START_TIMEOUT, _FINISH_TIMEOUT = 20, 60  # seconds that a run waits for the service


class Tracker:
    """One W&B run, or nothing: with an empty project, or after the first failure, every call does nothing.

    `wandb_config.mode`: "online", "offline", "disabled", or "auto", which is offline where no API key is found, so that
    a run never waits for a login. A run that cannot begin online goes on offline. What is chosen, and a failure, is
    said once.
    """

    def __init__(self, config: Any, enabled: bool = True):
        settings = config.wandb_config
        mode = _mode(settings.mode)
        self._run = None
        if not settings.project or mode == "disabled" or not enabled:
            return
        for attempt in ("online", "offline") if mode == "online" else (mode,):
            try:
                self._run = _start(config, attempt)
                return
            except Exception as error:  # here and below: not installed, no network, full disk, a defect of its own
                _say(f"cannot start in mode {attempt}", error)

    def log(self, phase: str, values: Mapping[str, Any], step: int) -> None:
        """Logs numbers of a phase, drawn over the steps of that phase."""
        self._call(lambda run: run.log({f"{phase}/{name}": value for name, value in {**values, "step": step}.items()}))

    def table(self, phase: str, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Logs a table."""

        def action(run: Any) -> None:
            import wandb

            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            run.log({f"{phase}/{name}": table, f"{phase}/step": step})

        self._call(action)

    def finish(self) -> None:
        """Ends the run."""
        self._call(lambda run: run.finish())
        self._run = None

    def _call(self, action: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            _say("off from here on, metrics.jsonl goes on", error)
            self._run = None


def _say(what: str, error: Exception) -> None:
    print(f"wandb: {what} ({one_line(error)[:200]})", flush=True)


def _start(config: Any, mode: str) -> Any:
    """Begins a W&B run; imported here, so that a run without tracking needs neither the package nor its second."""
    import wandb

    settings = config.wandb_config
    prefix = "debug-" if config.debug else ""
    Path(settings.wandb_log_path).mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=prefix + settings.project,
        entity=settings.entity or None,
        name=f"{prefix}{settings.project}-{datetime.datetime.now():%Y-%m-%d-%H-%M-%S}",
        config=config.to_dict(),
        dir=settings.wandb_log_path,
        mode=mode,
        settings=wandb.Settings(silent=True, init_timeout=_START_TIMEOUT, finish_timeout=_FINISH_TIMEOUT),
    )
    for phase in config.phases:
        run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
    where = run.url if mode == "online" else f"offline (upload with: wandb sync {Path(run.dir).parent})"
    print(f"wandb: {where}", flush=True)
    return run


def _mode(wanted: str) -> str:
    """What "auto" means here: the environment's WANDB_MODE, else online with an API key, else offline."""
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc() else "offline"


def _in_netrc() -> bool:
    """Whether `wandb login` has left a key in ~/.netrc."""
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False  # no such file, or one that wandb could not read either
