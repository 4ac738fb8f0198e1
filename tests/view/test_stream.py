"""A transformers streamer receives exactly the answer, in order, with every way of decoding."""

import numpy as np
import pytest
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import difflm_jax
from difflm_jax import UserError
from tests.tiny_checkpoint import save_tiny_model

PROMPT = "A rather long prompt."


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.drafts, self.ends = [], [], 0

    def put(self, value):
        assert not self.ends
        self.puts.append(value)

    def put_draft(self, value):
        self.drafts.append((sum(map(len, self.puts[1:])), value))

    def end(self):
        self.ends += 1


@pytest.mark.parametrize(
    ("rule", "options", "passes_are_seen"),
    [
        (("full", False, None), {"steps": 6, "algorithm": "random"}, True),
        (("full", False, None), {"steps": 12, "threshold": 0.2, "edit_threshold": 0.3, "block_length": 4}, True),
        (("prefix", True, None), {"steps": 16, "remask": "conf"}, True),
        (("block", True, 4), {"steps": 6, "temperature": 0.8}, True),
        (("causal", True, None), {}, True),
        (("causal", True, None), {"temperature": 0.8}, False),
        (("causal", True, None), {"algorithm": "speculative", "strategy": "lookup"}, True),
    ],
    ids=["plain", "edited", "remasked", "blocks", "causal", "causal draws", "speculative"],
)
def test_the_parts_joined_are_the_answer(model_dir, rule, options, passes_are_seen):
    attention, shift, block_length = rule
    lm = difflm_jax.load(model_dir, attention=attention, logit_shift=shift, block_length=block_length, dtype="float32")
    streamer = Recorder()
    plain = lm.generate(PROMPT, 12, batch_size=1, **options)
    streamed = lm.generate(PROMPT, 12, batch_size=1, streamer=streamer, **options)
    assert streamed.texts == plain.texts
    assert streamer.ends == 1
    assert streamer.puts[0].tolist() == [lm.prompts.prompt(PROMPT).tolist()]
    assert np.concatenate(streamer.puts[1:]).tolist() == plain.tokens[0].tolist()
    if attention in ("block", "causal") and passes_are_seen:
        assert len(streamer.puts) > 2  # in parts
    assert bool(streamer.drafts) == (passes_are_seen and attention != "causal")
    for sent, draft in streamer.drafts:
        assert lm.mask_token_id not in draft and draft.shape[0] == 1
        assert sent + draft.shape[1] <= 12


def test_an_iterator_of_text_skips_the_prompt_and_ends_with_the_stop_string(model_dir):
    lm = difflm_jax.load(model_dir, attention="block", logit_shift=True, block_length=4, dtype="float32")
    whole = lm.generate(PROMPT, 12, steps=6, batch_size=1, eos_penalty=float("inf")).texts[0]
    stop = whole[len(whole) // 2]
    streamer = TextIteratorStreamer(lm.tokenizer, skip_prompt=True, timeout=10, skip_special_tokens=True)
    options = {"steps": 6, "batch_size": 1, "eos_penalty": float("inf"), "stop": stop}
    out = lm.generate(PROMPT, 12, streamer=streamer, **options)
    assert "".join(streamer) == lm.tokenizer.decode(out.tokens[0], skip_special_tokens=True)


def test_on_pass_is_told_too_and_several_prompts_are_refused(model_dir):
    lm = difflm_jax.load(model_dir, dtype="float32")
    seen, streamer = [], Recorder()
    lm.generate(PROMPT, 12, steps=6, batch_size=1, on_pass=seen.append, streamer=streamer)
    assert seen and streamer.ends == 1
    with pytest.raises(UserError, match=r"streamer: .* 2 were given"):
        lm.generate([PROMPT, "Hi"], 12, streamer=streamer)
