"""What is due after which step of a phase: metrics lines, and evaluations with their samples and checkpoints."""

import dataclasses

from difflm_jax.training.phase import PhaseData


@dataclasses.dataclass(frozen=True)
class Cadence:
    """Steps count from 1 to `total`. Everything follows from sizes and config keys, so that a resumed run agrees."""

    total: int
    log_interval: int
    evaluation_interval: int

    @classmethod
    def of(cls, data: PhaseData) -> "Cadence":
        """As the config keys of a phase say."""
        config, total = data.config, data.steps
        interval = min(total, data.plan.steps_per_epoch) // max(1, config.log_frequency_per_epoch)
        return cls(total, config.log_interval, max(1, interval))

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation, samples and a checkpoint follow `step`. They always follow the last one."""
        return step % self.evaluation_interval == 0 or step == self.total

    def logs(self, step: int) -> bool:
        """Whether a metrics line follows `step`."""
        return step % self.log_interval == 0 or self.evaluates(step)
