"""Optional logging to Weights & Biases or trackio, next to `metrics.jsonl`. It never stops a run."""

import datetime
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from difflm_jax.errors import one_line

_START_TIMEOUT, _FINISH_TIMEOUT = 20, 60  # seconds that a run waits for the service


class Tracker:
    """One run of the service. With an empty project, or after the first failure, every call does nothing.

    `wandb_config.mode` is "online", "offline", "disabled", or "auto". With "auto", wandb's own settings decide; without
    an API key the run is offline and never waits for a login. A run that cannot begin online continues offline. The
    choice and any failure are printed once.
    """

    def __init__(self, config: Any, enabled: bool = True):
        settings = config.wandb_config
        self._run, self._service = None, settings.service
        if not settings.project or not enabled or settings.mode == "disabled":
            return
        if settings.service == "trackio":
            try:
                self._run = _start_trackio(config)
            except Exception as error:
                self._say("cannot start", error)
            return
        if (mode := tracking_mode(settings.mode)) == "disabled":
            return
        for attempt in ("online", "offline") if mode == "online" else (mode,):
            try:
                self._run = _start(config, attempt)
                return
            except Exception as error:  # here and below: not installed, no network, full disk, a bug in it
                self._say(f"cannot start in mode {attempt}", error)

    def log(self, phase: str, values: Mapping[str, Any], step: int) -> None:
        """Logs numbers of a phase against the steps of that phase."""
        self._call(lambda run: run.log({f"{phase}/{name}": value for name, value in {**values, "step": step}.items()}))

    def table(self, phase: str, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Logs a table of text."""

        def action(run: Any) -> None:
            service = importlib.import_module(self._service)
            table = service.Table(columns=list(columns), data=[list(row) for row in rows])
            run.log({f"{phase}/{name}": table, f"{phase}/step": step})

        self._call(action)

    def finish(self) -> None:
        """Ends the run."""
        self._call(lambda run: run.finish())
        self._run = None

    def _say(self, what: str, error: Exception) -> None:
        print(f"{self._service}: {what} ({one_line(error)[:200]})", flush=True)

    def _call(self, action: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._say("off from here on, metrics.jsonl continues", error)
            self._run = None


def _start_trackio(config: Any) -> Any:
    """Begins a trackio run, which is stored on this machine; `trackio show` displays it."""
    import trackio

    name, prefix = config.wandb_config.project, "debug-" if config.debug else ""
    run = trackio.init(
        prefix + name, f"{prefix}{name}-{datetime.datetime.now():%Y-%m-%d-%H-%M-%S}", config=config.to_dict(),
        embed=False,
    )  # fmt: skip
    print(f"trackio: see it with: trackio show --project {prefix + name}", flush=True)
    return run


def _start(config: Any, mode: str) -> Any:
    """Begins a W&B run. Imports wandb here, since it takes a second and may not be installed."""
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


def tracking_mode(wanted: str) -> str:
    """Returns `wanted`, or for "auto" the mode that applies here.

    That is wandb's own setting (`wandb offline`, `wandb disabled`, environment variables), else "online" with an API
    key, else "offline".
    """
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):  # wandb itself no longer reads it
        return "disabled"
    try:
        import wandb
        from requests.utils import get_netrc_auth

        own = wandb.setup().settings
        if own.mode != "online" or os.environ.get("WANDB_MODE"):
            return own.mode
        return "online" if own.api_key or get_netrc_auth(own.base_url) else "offline"
    except Exception:  # not installed, or broken: `_start` says why
        return "offline"
