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
import tensorstore
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from difflm_jax.errors import UserError, one_line

Tree = Any


class Checkpoints:
    """The checkpoints of one phase, in `directory`/<step>.

    The `keep` latest stay, and so does the best (lowest `eval_loss` in the metrics; of equals the latest). A directory
    takes the name of its step only when it is complete, so that one whose writing was cut off is never found; and a
    checksum is stored with the arrays, so that a damaged one is never taken for whole.
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
                    # Directories made in the background that fail leave threads waiting for them, and the process
                    # alive for minutes.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                ),
            )

    def save(self, step: int, state: Tree, metrics: Mapping[str, Any] | None = None) -> None:
        """Begins to write `state` (a pytree of arrays) and `metrics` (what JSON can hold) as checkpoint `step`.

        Returns once the arrays are copied, so that they may be donated. An error of the writing itself is raised as
        `UserError` by the next call that has to wait for it.
        """
        self.wait()
        about = {"checksum": int(jax.jit(_checksum)(state)), "leaves": _leaves(state)}
        with self._errors(f"checkpoint {step} could not be written"):
            self._manager.save(
                step,
                args=ocp.args.StandardSave(state),
                metrics=dict(metrics or {}),
                custom_metadata=about,
                force=True,
            )

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        self.wait()
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The last step that has a complete checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The kept step with the lowest `eval_loss`; None if no checkpoint has one."""
        return _best({step: self.metrics(step) for step in self.steps()})

    def metrics(self, step: int) -> dict[str, Any]:
        """The metrics that were saved with `step`."""
        self.wait()
        with self._errors(f"checkpoint {step} has no readable metrics"):
            return dict(self._manager.metrics(step) or {})

    def restore(self, step: int, abstract_state: Tree) -> Tree:
        """The state of `step` in the structure and shardings of `abstract_state`; it may be donated.

        The leaves of `abstract_state` are arrays or `jax.ShapeDtypeStruct`s of the shapes and dtypes that were saved;
        without a sharding they go to the first device. Raises `UserError` that names the directory for a checkpoint
        that is damaged or of another shape.
        """
        self.wait()
        abstract_state = jax.tree.map(_abstract, abstract_state)
        try:
            state, checksum = self._read(step, abstract_state)
        except Exception as error:  # orbax raises bare `Exception` for arrays that cannot be read
            raise self._unusable(step, one_line(error)) from error
        # Restored arrays may lie in memory that XLA does not own and cannot reuse: copies can be donated.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
        state = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(state)
        if int(jax.jit(_checksum)(state)) != checksum:
            raise self._unusable(step, "its arrays are not those that were written")
        return state

    def wait(self) -> None:
        """Waits until everything is on disk; raises what went wrong on the way."""
        with self._errors("a checkpoint could not be written"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads behind this object."""
        with self._errors("a checkpoint could not be written"):
            self._manager.close()

    def _read(self, step: int, abstract_state: Tree) -> tuple[Tree, int]:
        """(the state, its checksum when it was saved); raises whatever orbax and tensorstore may raise."""
        about = self._manager.metadata(step).custom_metadata
        if different := sorted(about["leaves"].items() ^ _leaves(abstract_state).items()):
            raise ValueError(f"the checkpoint and this run differ in {different[0][0]}")
        # orbax reads arrays concurrently, and prints a traceback for every further one that fails: look first.
        store = tensorstore.KvStore.open(f"file://{self._directory}/{step}/default/|ocdbt:").result()
        for key in store.list().result():
            if not store.read(key).result().value:  # of a file that is gone it says: empty
                raise FileNotFoundError(f"{key.decode()} is missing")
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract_state)), about["checksum"]

    def _unusable(self, step: int, reason: str) -> UserError:
        return UserError(
            f"{self._directory / str(step)}: the checkpoint cannot be restored ({reason[:200]}); if it is damaged, "
            "delete that directory to go on from the one before it"
        )

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turns the errors of disks and file formats into a `UserError` that names the directory."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(f"{self._directory}: {what} ({one_line(error)[:200]})") from error


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


def _leaves(tree: Tree) -> dict[str, str]:
    """{path: dtype and shape} of all leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _checksum(tree: Tree) -> jax.Array:
    """A uint32 over all bits of all leaves, computed where they lie; any one changed bit changes it.

    Each leaf counts as the sum of its words, each times an odd number, modulo 2^32: an odd number has an inverse, so no
    change of one word is lost, and integer sums do not depend on their order, that is on the sharding.
    """
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        word = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
        place = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(words.shape):  # the index in the flattened leaf, without moving a sharded one
            place = place * size + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        total = 31 * total + jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
    return total


def _silence_orbax() -> None:
    """Drops the log records of orbax: it tells of every step of every save, and its errors are raised besides."""
    logger = logging.getLogger("absl")
    if _not_from_orbax not in logger.filters:
        logger.addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts
