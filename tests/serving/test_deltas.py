"""Deltas of an answer: joined, they are the answer, for any tokens, stop strings and pieces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from difflm_jax.sampling.text import cut_answer
from difflm_jax.serving.deltas import Deltas
from tests.byte_tokenizer import byte_tokenizer


def bytes_fallback() -> PreTrainedTokenizerFast:
    """Words, and single bytes as SentencePiece has them, which its decoder reads a run at a time."""
    words = ["▁", "▁a", "b", "Y", ".", "▁n", "'t", "é"]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", *[f"<0x{i:02X}>" for i in range(256)], *words])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def cleaned() -> PreTrainedTokenizerFast:
    tokenizer = bytes_fallback()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    return tokenizer


TOKENIZERS = {"bytes": byte_tokenizer(), "sentencepiece": bytes_fallback(), "cleaned": cleaned()}
# Beginnings and ends of characters of two, three and four bytes, and letters that stops are made of.
_BYTES = [*b"ab.Y \n", *"é€😀".encode(), 0xE2, 0xFF]


@st.composite
def answers(draw, name: str):
    tokenizer = TOKENIZERS[name]
    pieces = tokenizer.get_vocab()
    if name == "bytes":
        ids = [tokenizer(chr(b), add_special_tokens=False)["input_ids"][0] for b in _BYTES if b < 128]
        ids += [i for text in "é€😀" for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    else:
        ids = [pieces[f"<0x{b:02X}>"] for b in _BYTES] + list(range(257, len(pieces)))
    tokens = draw(st.lists(st.sampled_from(ids), max_size=24))
    stops = draw(st.lists(st.sampled_from(["Y", "ab", "b.Y", "é", "\n\n", "aba"]), max_size=3, unique=True))
    cuts = sorted(draw(st.lists(st.integers(0, len(tokens)), max_size=8)))
    return tokens, stops, cuts


@pytest.mark.parametrize("name", TOKENIZERS)
def test_joined_deltas_are_the_text_of_the_answer(name):
    tokenizer = TOKENIZERS[name]

    @settings(max_examples=150, deadline=None)
    @given(answers(name))
    def check(case):
        tokens, stops, cuts = case
        decode = lambda part: tokenizer.decode(list(part), skip_special_tokens=True)  # noqa: E731
        text, kept = cut_answer(np.asarray(tokens, np.int32), [], stops, decode)
        deltas = Deltas(tokenizer, stops)
        parts = [deltas.feed(tokens[:cut]) for cut in cuts if cut <= len(kept)]
        assert text.startswith("".join(parts))
        assert "".join([*parts, deltas.finish(text)]) == text

    check()


def test_text_is_not_held_back_longer_than_needed():
    tokenizer = TOKENIZERS["bytes"]
    deltas = Deltas(tokenizer, ["END"])
    tokens = tokenizer("no EN", add_special_tokens=False)["input_ids"]
    assert deltas.feed(tokens) == "no "  # EN may begin the stop string
    assert deltas.feed([*tokens, *tokenizer("D", add_special_tokens=False)["input_ids"]]) == ""
    deltas = Deltas(tokenizer, ["END"])
    assert deltas.feed(tokens) + deltas.feed([*tokens, *tokens[:1]]) == "no ENn"
