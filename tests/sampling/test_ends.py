"""Where an answer ends, and that a prompt does not: EOS ids of every file, special stop texts, tokenizers with EOS."""

import json

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import difflm_jax
from difflm_jax.sampling.text import Prompts, cut_answer, stop_strings
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny_checkpoint import save_tiny_model


def test_eos_ids_of_generation_config_end_an_answer_and_survive_an_export(tmp_path):
    """transformers' generate takes them from there."""
    path = save_tiny_model(tmp_path / "model")
    written = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**written, "eos_token_id": [258, 65]}))
    theirs = AutoModelForCausalLM.from_pretrained(path).generation_config.eos_token_id
    lm = difflm_jax.load(path, dtype="float32")
    assert set(theirs) <= set(lm.eos_token_ids)
    lm.save_pretrained(tmp_path / "exported")
    assert difflm_jax.load(tmp_path / "exported", dtype="float32").eos_token_ids == lm.eos_token_ids
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").generation_config.eos_token_id == theirs


def test_a_stop_text_that_is_a_special_token_is_found():
    tokenizer = byte_tokenizer()
    tokens = np.asarray(tokenizer("yes<|pad|>no more")["input_ids"])
    stops, ends = stop_strings(["<|pad|>", "more"], tokenizer)

    def decode(row):
        return tokenizer.decode(row.tolist(), skip_special_tokens=True)

    assert decode(tokens) == "yesno more"
    text, kept = cut_answer(tokens, ends, stops, decode)
    assert (text, len(kept)) == ("yes", 4)
    assert cut_answer(tokens, [], ["more"], decode)[0] == "yesno "


@pytest.mark.parametrize("text", ["What?", "", "<|im_start|>"])
def test_a_tokenizer_that_adds_eos_does_not_end_prompts_and_canvases(text):
    tokenizer = byte_tokenizer(template=None)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", start), ("<|im_end|>", end)]
    )
    prompts = Prompts(tokenizer, 264, 259)
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(text)["input_ids"] == [start, *bare, end]
    assert prompts.prompt(text).tolist() == prompts.canvas(text).tolist() == [start, *bare]
