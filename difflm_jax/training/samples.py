"""Sample generations during training: each evaluation answers a few prompts of the test split."""

from typing import Any

import numpy as np

from difflm_jax.lm import LanguageModel
from difflm_jax.training.metrics import MetricsLog
from difflm_jax.training.parameters import with_trained
from difflm_jax.training.phase import PhaseData
from difflm_jax.training.tracking import Tracker


class SampleLogger:
    """Answers the same prompts at every evaluation; writes `samples.jsonl`, a W&B table and a line to the terminal."""

    def __init__(self, lm: LanguageModel, data: PhaseData, log: MetricsLog, tracker: Tracker):
        self._lm, self._config, self._phase, self._log, self._tracker = lm, data.config, data.name, log, tracker
        self._prompts, self._references = _prompts_and_answers(
            lm, data.test_rows, data.config.sample_prompts, data.config.sample_tokens
        )

    def __call__(self, trained: dict[str, Any], step: int) -> None:
        """Answers the prompts with the collections `trained` after `step`, and logs (prompt, reference, answer)."""
        if not self._prompts:
            return
        lm = with_trained(self._lm, trained)
        length = self._config.sample_tokens
        steps = max(self._config.diffusion_steps, lm.diffusion.fewest_passes(length))
        answers = lm.generate(self._prompts, length, steps).texts
        texts = [lm.tokenizer.decode(prompt.tolist()) for prompt in self._prompts]
        rows = list(zip(texts, self._references, answers, strict=True))
        for prompt, reference, answer in rows:
            self._log.append(
                {"phase": self._phase, "step": step, "prompt": prompt, "reference": reference, "answer": answer}
            )
        self._tracker.table(self._phase, "samples", ["prompt", "reference", "answer"], rows, step)
        print(
            f"{self._phase} step {step} sample: {_short(self._references[0])!r} -> {_short(answers[0])!r}", flush=True
        )


def _prompts_and_answers(
    lm: LanguageModel, rows: Any, count: int, new_tokens: int
) -> tuple[list[np.ndarray], list[str]]:
    """Returns (prompt tokens, texts of the answers) of the first `count` rows with an answer and a usable prompt.

    A usable prompt leaves room for an answer of `new_tokens` within the model's longest sequence.
    """
    prompts, answers = [], []
    block_length = lm.block_length or 1
    room = lm.config.max_position_embeddings - -(-new_tokens // block_length) * block_length
    for row in rows:
        if len(prompts) == count:
            break
        prompt_length = row["prompt_length"]
        if 0 < prompt_length < row["length"] and prompt_length <= room:
            tokens = np.asarray(row["tokens"], np.int32)
            prompts.append(tokens[:prompt_length])
            answers.append(lm.tokenizer.decode(tokens[prompt_length:].tolist(), skip_special_tokens=True))
    return prompts, answers


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."
