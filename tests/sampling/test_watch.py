"""Watching does not change what is decoded; terminal and page show what happened, and can be steered by no text."""

import io
import json
import re

import numpy as np
import pytest

import difflm_jax
from difflm_jax import UserError
from difflm_jax.sampling.watch import Pass
from difflm_jax.view.page import PageRecorder
from difflm_jax.view.pieces import Pieces, printable, width
from difflm_jax.view.terminal import TerminalView
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny_checkpoint import save_tiny_model

PROMPTS = ["Hi", "A rather longer prompt than the first one."]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (("block", True, 4), {"steps": 6, "temperature": 0.8}),
        (("causal", True, None), {"temperature": 0.8}),
        (("prefix", True, None), {"steps": 16, "remask": "conf"}),
        (("full", False, None), {"steps": 12, "threshold": 0.2, "edit_threshold": 0.3, "block_length": 4}),
    ],
    ids=str,
)
def test_a_watched_generation_is_the_same_and_its_passes_make_up_the_answer(model_dir, rule, options):
    attention, shift, block_length = rule
    lm = difflm_jax.load(model_dir, attention=attention, logit_shift=shift, block_length=block_length, dtype="float32")
    seen: list[Pass] = []
    plain = lm.generate(PROMPTS, 12, **options)
    watched = lm.generate(PROMPTS, 12, on_pass=seen.append, **options)
    assert watched.texts == plain.texts
    assert watched.steps.tolist() == plain.steps.tolist()
    assert len(seen) >= plain.steps.max()
    canvas = np.full((2, 12), lm.mask_token_id)
    for number, one in enumerate(seen, 1):
        assert (one.number, list(one.rows)) == (number, [0, 1])
        opened = (one.tokens == lm.mask_token_id) & (canvas != lm.mask_token_id)
        assert not (one.written & opened).any()
        canvas = np.where(one.written, one.tokens, np.where(opened, lm.mask_token_id, canvas))
        np.testing.assert_array_equal(canvas, one.tokens)
        np.testing.assert_array_equal(one.confidence > 0, canvas != lm.mask_token_id)
        assert one.candidates.shape == (2, one.block.stop - one.block.start, 5)
        assert (np.diff(one.probabilities, axis=-1) <= 0).all() and one.probabilities.max() <= 1 + 1e-6
        assert (one.candidates != lm.mask_token_id).all()
        if "temperature" not in options:  # what is committed is the likeliest token
            at = np.argwhere(one.written[:, one.block])
            likeliest = one.candidates[at[:, 0], at[:, 1], 0]
            np.testing.assert_array_equal(one.tokens[:, one.block][at[:, 0], at[:, 1]], likeliest)
            confidence = one.confidence[:, one.block][at[:, 0], at[:, 1]]
            np.testing.assert_allclose(confidence, one.probabilities[at[:, 0], at[:, 1], 0], rtol=1e-4)
    for row, prompt in zip(canvas, seen[-1].prompts, strict=True):
        assert "Hi" in lm.tokenizer.decode(prompt) or "longer" in lm.tokenizer.decode(prompt)
        answer = plain.tokens[0] if "Hi" in lm.tokenizer.decode(prompt) else plain.tokens[1]
        assert row[: len(answer)].tolist() == answer.tolist()


def test_a_watched_infilling_keeps_what_was_given(model_dir):
    lm = difflm_jax.load(model_dir, dtype="float32")
    seen: list[Pass] = []
    text = "ab<|mask|>cd<|mask|><|mask|>e"
    watched = lm.infill(text, steps=2, on_pass=seen.append)
    assert watched.texts == lm.infill(text, steps=2).texts
    assert [int(one.written.sum()) for one in seen] == [2, 1]
    given = lm.tokenizer("cd")["input_ids"]
    assert all(one.tokens[0, 1:3].tolist() == given and (one.confidence[0, 1:3] == 0).all() for one in seen)
    assert seen[0].real[0].sum() == 6


def a_pass(tokens, confidence, written, number=1, candidates=None, real=None, block=None) -> Pass:
    tokens, confidence = np.array([tokens], np.int32), np.array([confidence], np.float32)
    block = slice(0, tokens.shape[1]) if block is None else block
    k = np.zeros((1, block.stop - block.start, 1)) if candidates is None else np.array([candidates])
    return Pass(
        rows=[0],
        number=number,
        prompts=[np.array([5, 6])],
        tokens=tokens,
        real=np.ones_like(tokens, bool) if real is None else np.array([real]),
        confidence=confidence,
        written=np.array([written]),
        block=block,
        candidates=k.astype(np.int32),
        probabilities=np.full(k.shape, 0.5, np.float32),
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_terminal_shows_tokens_in_the_colour_of_their_confidence_and_redraws_in_place(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    tokenizer = byte_tokenizer()
    mask, eos = tokenizer.convert_tokens_to_ids("<|mask|>"), tokenizer.eos_token_id
    a, escape, newline = (tokenizer(c)["input_ids"][0] for c in ("a", "\x1b", "\n"))
    stream = Terminal()
    view = TerminalView(tokenizer, mask, (eos,), stream)
    likeliest = {"candidates": [[a], [eos], [newline]], "block": slice(0, 3)}
    view(a_pass([a, mask, mask, mask], [0.99, 0, 0, 0], [True, False, False, False], **likeliest))
    first = stream.getvalue()
    assert "\x1b[38;5;46;1;4ma\x1b[0m" in first  # sure: green, just committed: bold and underlined
    assert first.endswith("\x1b[2m░\x1b[0m\x1b[2m↵\x1b[0m\x1b[2m░\x1b[0m\n")  # an end, a guess, no active block
    assert "pass 1: 1 committed,\n" in first  # cut at the width, as a wrapped line could not be drawn over
    view(a_pass([a, escape, newline, eos], [0.99, 0.02, 0.5, 0.5], [False, True, True, True], number=2))
    second = stream.getvalue()[len(first) :]
    assert second.startswith("\x1b[2F\x1b[J")  # over the two lines of the first pass
    assert "\x1b[38;5;196;1;4m\\x1b\x1b[0m" in second and "↵" in second
    shown = re.sub(r"\x1b\[[0-9;]*[mFJ]", "", second)
    assert "\x1b" not in shown and shown.splitlines()[1] == "a\\x1b↵"  # the text itself cannot steer the terminal
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    TerminalView(tokenizer, mask, (eos,), stream)(a_pass([a] * 30, [1.0] * 30, [True] * 30))
    assert [width(line) for line in stream.getvalue().splitlines()[-2:]] == [20, 10]
    assert "[38" not in stream.getvalue()
    TerminalView(tokenizer, mask, (eos,), stream)(a_pass([mask], [0], [False], candidates=[[a]]))
    assert stream.getvalue().endswith("\n░\n")  # undimmed, a guess would look committed
    plain = io.StringIO()
    TerminalView(tokenizer, mask, (eos,), plain)(a_pass([a, mask], [1.0, 0], [True, False]))
    assert plain.getvalue() == "pass 1: 1 committed, 1 masks left  a░\n"


def test_pieces_keep_the_space_that_begins_them():
    tokenizer = byte_tokenizer()
    pieces = Pieces(tokenizer, tokenizer.convert_tokens_to_ids("<|mask|>"))
    assert "".join(pieces(token) for token in tokenizer("a b\n")["input_ids"]) == "a b\n"
    assert pieces(tokenizer("é")["input_ids"][0]) == "\ufffd"
    assert printable("a\n\x1b[31m\u202e") == "a↵\\x1b[31m\\u202e"
    assert width("日本é") == 5


def page_data(path) -> dict:
    page = path.read_text(encoding="utf-8")
    assert not re.search(
        r"(src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page
    )  # nothing else needed
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_every_change_and_no_text_can_leave_its_element(tmp_path):
    tokenizer = byte_tokenizer()
    mask = tokenizer.convert_tokens_to_ids("<|mask|>")
    less, a, b = (tokenizer(c)["input_ids"][0] for c in "<ab")
    page = PageRecorder(tokenizer, mask, "</script><script>alert(1)</script>", {"steps": 2})
    page(a_pass([a, mask, less], [0.9, 0, 0.4], [True, False, True], candidates=[[a], [b], [less]]))
    page(a_pass([mask, b, less], [0, 0.8, 0.4], [False, True, False], number=2, candidates=[[b], [b], [a]]))
    page.write(tmp_path / "page.html")
    data = page_data(tmp_path / "page.html")
    assert data["title"] == "</script><script>alert(1)</script>"
    assert (tmp_path / "page.html").read_text().count("</script>") == 2  # those of the page itself
    run, piece = data["runs"][0], {text: i for i, text in enumerate(data["pieces"])}
    assert run["start"] == [-1, -1, -1]
    assert run["passes"][0]["write"] == [[0, piece["a"], 0.9], [2, piece["<"], 0.4]]
    assert run["passes"][1] == {
        "write": [[1, piece["b"], 0.8]],
        "mask": [0],
        "alternatives": [[0, [piece["b"]], [0.5]], [1, [piece["b"]], [0.5]]],
    }
    with pytest.raises(UserError, match="cannot be written"):
        page.write(tmp_path / "nowhere" / "page.html")
