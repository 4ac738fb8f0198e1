"""Checkpoints of training state through orbax: asynchronous, atomic, the last ones and the best one kept."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from difflm_jax.errors import UserError, one_line

Tree = Any


class Checkpoints:
    """The checkpoints of one phase, in `directory`/<step>.

    The `keep` latest stay, and so does the best (lowest `eval_loss` in the metrics; of equals the latest). A directory
    appears under its step only when it is complete, so that one whose writing was cut off is never found.
    """

    def __init__(self, directory: str | Path, keep: int):
        self._directory = Path(directory).absolute()
        _silence_orbax()
        with self._errors("cannot be used"):
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_LatestAndBest(keep),
                    best_fn=_eval_loss,  # without one orbax stores no metrics
                    best_mode="min",
                    cleanup_tmp_directories=True,
                ),
            )

    def save(self, step: int, state: Tree, metrics: Mapping[str, Any] | None = None) -> None:
        """Begins to write `state` (a pytree of arrays) and `metrics` (what JSON can hold) as checkpoint `step`.

        Returns once the arrays are copied, so that they may be donated. An error of the writing itself is raised as
        `UserError` by the next call of `save`, `wait` or `close`.
        """
        with self._errors("a checkpoint could not be written"):
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=dict(metrics or {}), force=True)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The last step that has a checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The kept step with the lowest `eval_loss`; None if no checkpoint has one."""
        self.wait()
        return _best({step: self.metrics(step) for step in self.steps()})

    def metrics(self, step: int) -> dict[str, Any]:
        """The metrics that were saved with `step`."""
        self.wait()
        with self._errors(f"checkpoint {step} has no readable metrics"):
            return dict(self._manager.metrics(step) or {})

    def restore(self, step: int, abstract_state: Tree) -> Tree:
        """The state of `step`, in the structure, dtypes and shardings of `abstract_state`; it may be donated.

        The leaves of `abstract_state` are arrays or `jax.ShapeDtypeStruct`s; without a sharding they go to the first
        device. Raises `UserError` that names the directory for a checkpoint that is damaged or of another shape.
        """
        self.wait()
        abstract_state = jax.tree.map(_abstract, abstract_state)
        advice = "delete that directory to go on from the checkpoint before it"
        with self._errors(
            f"checkpoint {step} cannot be restored; if it is damaged, {advice}", self._directory / str(step)
        ):
            state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
        # Restored arrays may lie in memory that XLA does not own and cannot reuse: copies can be donated.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
        return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(state)

    def wait(self) -> None:
        """Waits until everything is on disk; raises what went wrong on the way."""
        with self._errors("a checkpoint could not be written"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads behind this object."""
        with self._errors("a checkpoint could not be written"):
            self._manager.close()

    @contextlib.contextmanager
    def _errors(self, what: str, culprit: Path | None = None) -> Iterator[None]:
        """Turns the errors of disks and file formats into a `UserError` that names the directory."""
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{culprit or self._directory}: {what} ({one_line(error)})") from error


@dataclasses.dataclass
class _LatestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the `keep` latest checkpoints and the best one."""

    keep: int

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        kept = {info.step for info in checkpoints[-self.keep :]}
        kept.add(_best({info.step: info.metrics or {} for info in checkpoints}))
        return [info.step in kept for info in checkpoints]


def _best(metrics: Mapping[int, Mapping[str, Any]]) -> int | None:
    """The step of the lowest finite `eval_loss`, the latest of equals."""
    losses = {step: _eval_loss(of_step) for step, of_step in metrics.items()}
    candidates = [step for step, loss in losses.items() if math.isfinite(loss)]
    return min(candidates, key=lambda step: (losses[step], -step), default=None)


def _eval_loss(metrics: Mapping[str, Any]) -> float:
    loss = metrics.get("eval_loss")
    return math.inf if loss is None else float(loss)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _silence_orbax() -> None:
    """Drops the log records of orbax: it tells of every step of every save, and its errors are raised besides."""
    logger = logging.getLogger("absl")
    if _not_from_orbax not in logger.filters:
        logger.addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts
