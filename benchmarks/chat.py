"""Free-form chat of a converted model and of its base: NLL of the answers under the base, and signs of degeneration.

    python benchmarks/chat.py --adapter=runs/quickstart/sft_model --data=questions.jsonl [--rows=50] [--tokens=64]

`--data` has prompts in any format that training takes (`question` rows, say; answers are not read). Printed for each
way of decoding: NLL of the answers under the causal base (nats per token), their length in tokens, and three shares:
repeated 4-grams, empty answers, and answers with an end of sequence.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax import load
from difflm_jax.data.chat import encode_prompt
from difflm_jax.lm import LanguageModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    lm = load(options.model, adapter=options.adapter, dtype=options.dtype)
    lines = Path(options.data).read_text(encoding="utf-8").splitlines()
    prompts = [text for text in map(first_turn, lines) if text][: options.rows]
    rows = [encode_prompt(lm.tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    ways = {"causal base": (lm.base(), options.tokens), "converted, 1 a pass": (lm, options.tokens)}
    ways |= {f"converted, {k} a pass": (lm, options.tokens // k) for k in (2, 4)}
    print(f"{len(rows)} prompts of {options.data}, at most {options.tokens} tokens")
    columns = ("decoding", "NLL under the base", "length", "repeated 4-grams", "empty", "ended", "passes")
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for name, (model, steps) in ways.items():
        out = model.generate([row.tolist() for row in rows], options.tokens, steps, batch_size=25)
        ended = [bool(np.isin(answer, lm.eos_token_ids).any()) for answer in out.tokens]
        figures = (
            answer_nll(lm.base(), rows, out.tokens),
            np.mean([len(answer) for answer in out.tokens]),
            np.mean([repeated(answer) for answer in out.tokens]),
            np.mean([not text.strip() for text in out.texts]),
            np.mean(ended),
            np.mean(out.steps),
        )
        print(f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |", flush=True)
        for prompt, text in list(zip(prompts, out.texts, strict=True))[:3]:
            print(f"    {prompt[:60]!r} -> {text[:160]!r}", flush=True)


def first_turn(line: str) -> str:
    """Returns the question of a JSON line: `question`, `prompt`, `text` or the first of `turns`."""
    row = json.loads(line)
    return next((row[key] for key in ("question", "prompt", "text") if key in row), "") or row.get("turns", [""])[0]


def answer_nll(base: LanguageModel, prompts: list[np.ndarray], answers: list[np.ndarray]) -> float:
    """Returns nats per token of all answers together, under the causal base."""
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    total, count = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = np.zeros((1, width), np.int32)
        both = np.concatenate([prompt, answer])
        tokens[0, : len(both)] = both
        log_p = jax.nn.log_softmax(base(tokens, np.arange(width)[None] < len(both))[0, : len(both) - 1])
        total -= float(jnp.take_along_axis(log_p, jnp.asarray(both[1:, None]), axis=1)[len(prompt) - 1 :].sum())
        count += len(answer)
    return total / max(count, 1)


def repeated(tokens: np.ndarray) -> float:
    """Returns the share of 4-grams that occurred before."""
    grams = [tuple(tokens[i : i + 4].tolist()) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


if __name__ == "__main__":
    main()
