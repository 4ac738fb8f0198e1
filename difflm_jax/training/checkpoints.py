"""Checkpoints of training state with orbax: asynchronous and atomic. The latest and the best ones are kept.

A failed save is reported and training continues. A damaged checkpoint is renamed and the previous one is used.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from difflm_jax.distributed.barriers import Barriers, BrokenBarrierError
from difflm_jax.distributed.processes import agreed, failure_of_any, is_writer, wait_for_all
from difflm_jax.errors import UserError, one_line
from difflm_jax.training.checksums import checksum_of, json_checksum, leaves_of
from difflm_jax.utils.files import write_whole

Tree = Any
_LATE_FILE = "late_metrics.json"
_METADATA_BYTES = 1 << 20  # orbax writes a few kilobytes in addition to the arrays


def shapes_of(state: Tree) -> Tree:
    """Returns `state` as `jax.ShapeDtypeStruct`s with shardings (default: first device), the template of a restore."""

    def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape_of, state)


class DamagedCheckpointError(UserError):
    """A checkpoint whose files differ from those that were written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read: its step, its state (may be donated) and the metrics saved with it."""

    step: int
    state: Tree
    metrics: dict[str, Any]


class Checkpoints:
    """The checkpoints of one phase, in `directory`/<step>.

    The `keep` latest and the best are kept. The best has the lowest `eval_loss` in its metrics; among equals it is the
    latest. A directory is renamed to its step only when it is complete, so an interrupted save is never found.
    Checksums of the arrays and the metrics reveal damage.
    """

    def __init__(self, directory: str | Path, keep: int):
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._writing: int | None = None  # the step that is being written
        self._late = _read_late(self._directory / _LATE_FILE)  # metrics by step
        _silence_orbax()
        if is_writer():
            self._rename_unreadable()
        wait_for_all("damaged checkpoints are put aside")
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        with self._errors("cannot be used"):
            return ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_LatestAndBest(self._keep, self._late),
                    best_fn=_eval_loss,  # without one orbax stores no metrics
                    best_mode="min",
                    cleanup_tmp_directories=True,
                    # If directories created in the background fail, threads wait for them and keep the process alive
                    # for minutes.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False, barrier_sync_fn=Barriers()),
                ),
            )

    def save(self, step: int, state: Tree, metrics: Mapping[str, Any] | None = None) -> None:
        """Begins to write `state` (a pytree of arrays) and `metrics` (JSON values) as checkpoint `step`.

        Returns once the arrays are copied, so they may be donated. A save that fails is reported, at once or by the
        next call. Its files are removed, and older checkpoints are kept.
        """
        self.settle()
        metrics, leaves = dict(metrics or {}), leaves_of(state)
        about = {
            "checksum": int(jax.jit(checksum_of)(state)),
            "leaves": leaves,
            "leaves_checksum": json_checksum(leaves),
            "metrics_checksum": json_checksum(metrics),
        }
        self._writing = step
        if self._late.pop(step, None):  # from a damaged checkpoint of this step
            self._write_late()
        if jax.process_count() > 1 and not agreed(self._has_room(step, state)):
            # During a save, the other processes would wait for the one that cannot continue.
            self._announce_failure("the disk of one of the processes has no room for its part")
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.StandardSave(state),
                metrics=metrics,
                custom_metadata=about,
                force=True,
            )
        except (OSError, ValueError) as error:
            self._announce_failure(_reason(error))

    def _has_room(self, step: int, state: Tree) -> bool:
        """Whether this process's part of `state` fits on its disk, tested with `posix_fallocate`."""
        shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
        needed = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0) + _METADATA_BYTES
        probe = self._directory / f"room-for-{step}-{jax.process_index()}"
        try:
            with probe.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, needed)
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
        return True

    def settle(self) -> None:
        """Waits until the current save is on disk, or has failed and is reported.

        All processes must call this. A save that fails in one of them fails in all.
        """
        if self._writing is None:
            return
        reason = None
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            reason = _reason(error)
        if (reason := failure_of_any(reason)) is not None:
            self._announce_failure(reason)
        self._writing = None

    def finish(self, step: int) -> None:
        """Waits for the current save. Raises `UserError` if `step`, the last of a phase, has no checkpoint."""
        if step not in self.steps():
            raise UserError(
                f"{self._directory}: the last checkpoint ({step}) could not be written; make room and give the same "
                f"command again: it resumes from {_of(self.latest())}"
            )

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, ascending."""
        self.settle()
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Returns the last step that has a complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the kept step with the lowest `eval_loss`; None if no checkpoint has one."""
        return _best({step: self._metrics_or_none(step) for step in self.steps()})

    def metrics(self, step: int) -> dict[str, Any]:
        """Returns the metrics that were saved with `step`, and those that `amend` added.

        Raises `DamagedCheckpointError` if they differ from what was written.
        """
        self.settle()
        try:
            metrics = dict(self._manager.metrics(step) or {})
            if self._about(step)["metrics_checksum"] != json_checksum(metrics):
                raise ValueError("its metrics are not those that were written")
        except Exception as error:  # orbax raises anything for files that it cannot read
            raise self._damaged(step, one_line(error)) from error
        return metrics | self._late.get(step, {})

    def amend(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds metrics to those of checkpoint `step`, for an evaluation that ran after the save."""
        self._late[step] = dict(metrics)
        self._write_late()

    def _write_late(self) -> None:
        if is_writer():
            records = {str(step): values for step, values in self._late.items()}
            write_whole(self._directory / _LATE_FILE, json.dumps(records) + "\n")

    def restore(self, step: int, abstract_state: Tree) -> Tree:
        """Returns the state of `step` in the structure and shardings of `abstract_state`. It may be donated.

        The leaves of `abstract_state` are arrays or `jax.ShapeDtypeStruct`s with the saved shapes and dtypes. Leaves
        without a sharding go to the first device. Raises `DamagedCheckpointError` if the files differ from what was
        written, and `UserError` if the shapes differ; both name the directory.
        """
        self.settle()
        abstract_state = shapes_of(abstract_state)
        try:
            about = self._about(step)
            leaves, checksum = about["leaves"], about["checksum"]
            # A damaged list must not be taken for that of another run. Older checkpoints have no checksum of it.
            if about.get("leaves_checksum", json_checksum(leaves)) != json_checksum(leaves):
                raise ValueError("its list of arrays is not the one that was written")
        except Exception as error:
            raise self._damaged(step, one_line(error)) from error
        if different := sorted(leaves.items() ^ leaves_of(abstract_state).items()):
            raise UserError(
                f"{self._directory / str(step)}: the checkpoint and this run differ in {different[0][0]}: choose "
                "another output_dir, or the settings that the checkpoint was made with"
            )
        try:
            state = self._read(step, abstract_state)
        except Exception as error:  # orbax raises bare `Exception` for arrays that cannot be read
            raise self._damaged(step, one_line(error)) from error
        # XLA may not own the memory of restored arrays, and could not reuse it. Copies can be donated.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
        state = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(state)
        if int(jax.jit(checksum_of)(state)) != checksum:
            raise self._damaged(step, "its arrays are not those that were written")
        return state

    def restore_latest(self, abstract_state: Tree) -> Restored | None:
        """Restores the latest intact checkpoint; None if there is none. Damaged ones are reported and renamed."""
        return self._first_whole(self.latest, abstract_state)

    def restore_best(self, abstract_state: Tree) -> Restored | None:
        """Like `restore_latest`, for the best intact checkpoint, or the latest if none has an `eval_loss`."""
        return self._first_whole(lambda: self.best() or self.latest(), abstract_state)

    def close(self) -> None:
        """Waits for the current save and ends the background threads.

        After an error, a process may call this alone. At the end of a phase, no save is pending.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:  # it must not hide the error that ends the process
            print(f"{self._directory}: checkpoint {self._writing} could not be written ({_reason(error)})", flush=True)
            with contextlib.suppress(OSError, ValueError):
                self._manager.close()
            return
        with self._errors("a checkpoint could not be written"):
            self._manager.close()

    def _first_whole(self, choose: Callable[[], int | None], abstract_state: Tree) -> Restored | None:
        while (step := choose()) is not None:
            error = restored = None
            try:
                restored = Restored(step, self.restore(step, abstract_state), self.metrics(step))
            except DamagedCheckpointError as found:
                error = found
            if not agreed(error is None):  # all processes must be able to read it
                self._put_aside(step, error or self._damaged(step, "another process cannot read it"))
                continue
            return restored
        return None

    def _put_aside(self, step: int, error: DamagedCheckpointError) -> None:
        self._rename(step)
        wait_for_all(f"checkpoint {step} is put aside")
        self._reopen()
        print(f"{error}; it is kept as damaged-{step}, and {_of(self.latest())} is used instead", flush=True)

    def _rename(self, step: int) -> None:
        """Renames a damaged checkpoint, so that its step can be written again."""
        target = self._directory / f"damaged-{step}"
        if is_writer():
            shutil.rmtree(target, ignore_errors=True)
            with self._errors(f"the damaged checkpoint {step} cannot be renamed"):
                (self._directory / str(step)).rename(target)

    def _rename_unreadable(self) -> None:
        """Renames checkpoints with truncated or unknown JSON, because orbax reads that of all before it opens any."""
        for path in self._directory.glob("[0-9]*/"):
            try:
                for file in ("_CHECKPOINT_METADATA", "metrics/metrics"):
                    json.loads((path / file).read_bytes())
                ocp.metadata.get_step_metadata(path)
            except Exception as error:  # orbax raises anything for files that it cannot read
                if path.name.isdecimal():
                    self._rename(int(path.name))
                    print(f"{self._damaged(int(path.name), one_line(error))}; it is kept as damaged-{path.name}")

    def _announce_failure(self, reason: str) -> None:
        """Reports that a save failed, and removes what it has written so far."""
        step, self._writing = self._writing, None
        self._reopen()
        print(
            f"{self._directory}: checkpoint {step} could not be written ({reason[:200]}); training continues, "
            f"the last one on disk is {_of(self.latest())}",
            flush=True,
        )

    def _reopen(self) -> None:
        """Opens a new manager. After a failure, the old one would list checkpoints that were never written."""
        with contextlib.suppress(OSError, ValueError):
            self._manager.close()
        self._manager = self._open()

    def _about(self, step: int) -> dict[str, Any]:
        return self._manager.metadata(step).custom_metadata

    def _metrics_or_none(self, step: int) -> dict[str, Any]:
        try:
            return self.metrics(step)
        except DamagedCheckpointError:
            return {}

    def _read(self, step: int, abstract_state: Tree) -> Tree:
        """Returns the state. Raises whatever orbax and tensorstore raise."""
        # Check first: orbax reads arrays concurrently and prints a traceback for every further one that fails.
        store = tensorstore.KvStore.open(f"file://{self._directory}/{step}/default/|ocdbt:").result()
        for key in store.list().result():
            if not store.read(key).result().value:  # a missing file reads as empty
                raise FileNotFoundError(f"{key.decode()} is missing")
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract_state))

    def _damaged(self, step: int, reason: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"{self._directory / str(step)}: the checkpoint is damaged ({reason[:200]})")

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turns the errors of disks and file formats into a `UserError` that names the directory."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(f"{self._directory}: {what} ({one_line(error)[:200]})") from error


@dataclasses.dataclass
class _LatestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the `keep` latest checkpoints and the best one. `late`: metrics by step that were added after a save."""

    keep: int
    late: Mapping[int, Mapping[str, Any]]

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        kept = {info.step for info in checkpoints[-self.keep :]}
        metrics = {info.step: {**(info.metrics or {}), **self.late.get(info.step, {})} for info in checkpoints}
        kept.add(_best(metrics))
        return [info.step in kept for info in checkpoints]


def _reason(error: BaseException) -> str:
    """Returns why a save failed; "" if only another process knows."""
    while isinstance(error, BrokenBarrierError) and error.__context__ is not None:
        error = error.__context__  # the barrier broke after this error
    text = "" if isinstance(error, BrokenBarrierError) else one_line(error)
    return text if len(text) <= 170 else f"{text[:60]} ... {text[-100:]}"  # the system's own message is at the end


def _read_late(path: Path) -> dict[int, dict[str, Any]]:
    try:
        return {int(step): dict(values) for step, values in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):  # nothing was added: the file is written atomically
        return {}


def _best(metrics: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Returns the step with the lowest finite `eval_loss`, the latest among equals; None if there is none."""
    losses = {step: _eval_loss(of_step) for step, of_step in metrics.items()}
    candidates = [step for step, loss in losses.items() if math.isfinite(loss)]
    return min(candidates, key=lambda step: (losses[step], -step), default=None)


def _eval_loss(metrics: Mapping[str, Any]) -> float:
    loss = metrics.get("eval_loss")
    return math.inf if loss is None else float(loss)


def _of(step: int | None) -> str:
    return "no checkpoint" if step is None else f"checkpoint {step}"


def _silence_orbax() -> None:
    """Drops the log records of orbax: it logs every step of every save, and raises its errors anyway."""
    logger = logging.getLogger("absl")
    if _not_from_orbax not in logger.filters:
        logger.addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts
