"""Gemma 3 270M, a real base model of 18 layers in five quantised types, against transformers on the same weights."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import difflm_jax
from difflm_jax.checkpoint.source import open_source

NEW_TOKENS = 12
NEAR_TIE = 1e-4  # relative to the largest logit: sums in another order may differ by this much
TEXTS = (
    "The capital of France is", "The capital of Japan is", "Water boils at a temperature of", "The largest planet is",
    "Once upon a time, in a small village,", "The three primary colours are", "Photosynthesis is the process by which",
    "In 1969, the first man", "The speed of light in vacuum is", "A haiku has three lines of", "1, 1, 2, 3, 5, 8, 13,",
    "def fibonacci(n):\n", "import numpy as np\n\n", "SELECT name, age FROM", "<html>\n<head>\n", "for (int i = 0; i <",
    "La capitale de l'Italie est", "Die Hauptstadt von Österreich ist", "El sol sale por el",
    "今日はとても", "北京是中国的",
    "Dear Sir or Madam,\n\n", "Recipe for pancakes:\n\n1.", "Q: What is 7 times 8?\nA:", "To be, or not to be,",
    "The mitochondria is the", "Roses are red, violets are", "My favourite book is",
    "The meaning of the word 'lucid' is",
    "According to the theory of evolution,", "Monday, Tuesday, Wednesday,", "It was the best of times, it was the",
)  # fmt: skip


@pytest.fixture(scope="module")
def theirs(gemma3: Path):
    """Returns transformers' model of the file. It dequantises every tensor with the same package, in float32."""
    return AutoModelForCausalLM.from_pretrained(gemma3.parent, gguf_file=gemma3.name, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model, tokens) -> np.ndarray:
    return model(torch.tensor(np.asarray([tokens]))).logits[0].numpy()


@pytest.mark.slow
@pytest.mark.usefixtures("optimised", "read_once")
def test_gemma_3_270m_gives_the_logits_and_tokens_of_transformers(gemma3, theirs):
    """Rows longer than its window of 512."""
    tokenizer = open_source(str(gemma3)).load_tokenizer()
    their_tokenizer = AutoTokenizer.from_pretrained(gemma3.parent, gguf_file=gemma3.name)
    texts = ["Hello world", " a  b   c", "1. a\n  2. b\n\n\nend", "naïve 你好 👍🏽", "<b>x</b>\t", "", *TEXTS]
    assert [tokenizer(text).input_ids for text in texts] == [their_tokenizer(text).input_ids for text in texts]
    tokens_BL = np.asarray([tokenizer("It was the best of times, it was the worst of times. " * 50).input_ids[:600]])
    expected = logits_of(theirs, tokens_BL[0])[None]
    ours = np.asarray(difflm_jax.load(str(gemma3), causal=True, dtype="float32")(tokens_BL))
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(ours.argmax(-1), expected.argmax(-1))


@torch.no_grad()
def continued(model, prompts: list[list[int]], ends: set[int]) -> list[list[int]]:
    """Returns greedy answers of transformers, up to and including an end token. The batch is padded on the left."""
    width = max(map(len, prompts))
    valid = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    limits = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": sorted(ends), "pad_token_id": 0}
    answers = model.generate(tokens, attention_mask=valid, **limits)[:, width:].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in answers]


@pytest.mark.slow
@pytest.mark.usefixtures("optimised", "read_once")
def test_gemma_3_270m_continues_32_texts_as_transformers_does(gemma3, theirs):
    """Compares greedy tokens of a batch of rows of any length. They may differ only after a near tie of two logits.

    `DIFFLM_GEMMA3_REPORT=FILE` writes how many texts were equal, and the gap of logits for each difference.
    """
    lm = difflm_jax.load(str(gemma3), causal=True, dtype="float32")
    prompts = [lm.tokenizer(text).input_ids for text in TEXTS]
    ours = lm.generate(prompts, max_new_tokens=NEW_TOKENS, steps=NEW_TOKENS, batch_size=32).tokens
    expected = continued(theirs, prompts, set(lm.eos_token_ids))
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, expected, strict=True)]
    width, gaps, errors = max(map(len, rows)), {}, []
    for first in range(0, len(rows), 8):  # logits of a quarter of the rows at a time, padded on the right
        batch = slice(first, first + 8)
        tokens = np.array([[*row, *[0] * (width - len(row))] for row in rows[batch]])
        valid = np.arange(width) < np.array([[len(row)] for row in rows[batch]])
        with torch.no_grad():
            their_logits = theirs(torch.tensor(tokens), attention_mask=torch.tensor(valid).long()).logits.numpy()
        difference = np.abs(np.asarray(lm(tokens, attention_mask=valid)) - their_logits)
        errors.append((difference[valid].max(-1) / np.abs(their_logits[valid]).max(-1)).max())
        for i, text in enumerate(TEXTS[batch], first):
            if ours[i].tolist() != expected[i]:
                at = next(j for j, (a, b) in enumerate(zip(ours[i].tolist(), expected[i], strict=False)) if a != b)
                logits = their_logits[i - first, len(prompts[i]) + at - 1]
                gaps[text] = float((logits[expected[i][at]] - logits[ours[i][at]]) / np.abs(logits).max())
    if path := os.environ.get("DIFFLM_GEMMA3_REPORT"):
        report = (
            f"equal: {len(TEXTS) - len(gaps)} of {len(TEXTS)}, gaps {gaps}, largest logit error {max(errors):.1e}\n"
        )
        Path(path).write_text(report, encoding="utf-8")
    assert all(0 <= gap < NEAR_TIE for gap in gaps.values()), gaps
    assert max(errors) <= 1e-3
    assert sum(len(set(tokens.tolist())) > 3 for tokens in ours) >= 24  # real text, not one repeated token
