"""Tests that answers are marked where the template puts them, prompts match generation, and cuts keep an answer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from difflm_jax.data.chat import Encoded, cut, encode_chat, encode_prompt, encode_texts, windows
from difflm_jax.data.examples import Options, Report, examples
from difflm_jax.data.sources import RowError, open_source
from difflm_jax.errors import UserError
from difflm_jax.sampling.text import Prompts
from tests.byte_tokenizer import CHATML, byte_tokenizer

TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": " 4, of course.\n"},
]

# Llama 3's template in brief: explicit BOS, trimmed contents, no newline after a turn.
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n\\n' + m.content | trim + eos_token }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{% endif %}"
)


def answers_of(tokenizer: Any, encoded: Encoded) -> list[str]:
    """Returns the marked runs of a row, decoded."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.answer_mask.astype(int), [0]])))
    return [tokenizer.decode(encoded.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_last_answer_is_marked_with_its_end(tokenizer: Any) -> None:
    encoded = encode_chat(tokenizer, TWO_TURNS)
    assert encoded.tokens.dtype == np.int32
    assert encoded.answer_mask.dtype == np.bool_
    assert encoded.tokens.shape == encoded.answer_mask.shape
    assert answers_of(tokenizer, encoded) == [" 4, of course.\n<|im_end|>"]
    assert encoded.tokens[-1] == tokenizer.eos_token_id
    whole = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert tokenizer.decode(encoded.tokens) == whole.rstrip()


def test_all_answers_are_marked(tokenizer: Any) -> None:
    encoded = encode_chat(tokenizer, TWO_TURNS, "all")
    assert answers_of(tokenizer, encoded) == ["It is 2.<|im_end|>", " 4, of course.\n<|im_end|>"]
    np.testing.assert_array_equal(encoded.tokens, encode_chat(tokenizer, TWO_TURNS, "last").tokens)


def test_what_follows_the_last_answer_is_left_out(tokenizer: Any) -> None:
    longer = [*TWO_TURNS, {"role": "user", "content": "Thanks"}]
    for answers in ("last", "all"):
        np.testing.assert_array_equal(
            encode_chat(tokenizer, longer, answers).tokens, encode_chat(tokenizer, TWO_TURNS, answers).tokens
        )


def test_an_opening_assistant_turn_is_context(tokenizer: Any) -> None:
    messages = [{"role": "assistant", "content": "Hello!"}, *TWO_TURNS[1:3]]
    assert answers_of(tokenizer, encode_chat(tokenizer, messages, "all")) == ["It is 2.<|im_end|>"]


def test_tool_calls_are_answers_and_tool_results_are_not(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sky", "arguments": '{"at": 1}'}}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    encoded = encode_chat(tokenizer, messages, "all", tools=[{"name": "sky"}])
    call = '<tool_call>{"name": "sky", "arguments": {"at": 1}}</tool_call><|im_end|>'
    assert answers_of(tokenizer, encoded) == [call, "Rain.<|im_end|>"]
    assert tokenizer.decode(encoded.tokens).startswith('<|im_start|>system\n{"type": "function", "function": {"name"')


@pytest.mark.parametrize("merges", [(), (("Ċ", "Ċ"),)], ids=["no merge", "a merge across the seam"])
@pytest.mark.parametrize("answer", ["Yes", " Yes", "\nYes", "\n\nYes\n"])
def test_the_prompt_in_training_is_the_prompt_in_generation(answer: str, merges: tuple[tuple[str, str], ...]) -> None:
    tokenizer = byte_tokenizer(merges)
    messages = [{"role": "user", "content": "Really?"}, {"role": "assistant", "content": answer}]
    encoded, prompt = encode_chat(tokenizer, messages), encode_prompt(tokenizer, messages[:1])
    assert prompt.dtype == np.int32
    assert encoded.prompt_length == len(prompt)
    np.testing.assert_array_equal(encoded.tokens[: len(prompt)], prompt)
    assert answers_of(tokenizer, encoded) == [answer + "<|im_end|>"]


def test_an_answer_is_not_tokenised_as_the_beginning_of_a_text() -> None:
    """Tokenizers like Llama 2's put a space before a text. The answer, in the middle of one, must not get a second."""
    words = ["<unk>", "▁", "▁[Q]", "▁hi", "▁[A]", "▁yes", "</s>"]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words + sorted(set("".join(words[1:6])) - {"▁"}))}, []))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[Q] ' + m.content + ' [A]' if m.role == 'user' else ' ' + m.content + '</s>' }}"
        "{% endfor %}"
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    encoded = encode_chat(tokenizer, messages)
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert encoded.tokens.tolist() == whole
    assert tokenizer.convert_ids_to_tokens(encoded.tokens[encoded.answer_mask]) == ["▁", "y", "e", "s", "</s>"]


def test_template_of_llama_3() -> None:
    tokenizer = byte_tokenizer(template=LLAMA3)
    tokenizer.bos_token = "<|mask|>"
    encoded = encode_chat(tokenizer, TWO_TURNS, "all")
    assert answers_of(tokenizer, encoded) == ["It is 2.<|im_end|>", "4, of course.<|im_end|>"]
    assert (encoded.tokens == tokenizer.bos_token_id).sum() == 1


def test_eos_follows_an_answer_whose_template_does_not_end_in_it() -> None:
    """ChatML on a base model: the turn ends with its own token, and generation stops at EOS."""
    tokenizer = byte_tokenizer(eos="<|pad|>")
    encoded = encode_chat(tokenizer, TWO_TURNS, "all")
    assert answers_of(tokenizer, encoded) == ["It is 2.<|im_end|>", " 4, of course.\n<|im_end|><|pad|>"]


def test_a_template_that_rewrites_earlier_turns() -> None:
    """Qwen3's thinking template does this: only the last turn shows its thoughts."""
    template = CHATML.replace("+ message.content", "+ ('<think></think>' if loop.last else '') + message.content")
    tokenizer = byte_tokenizer(template=template)
    encoded = encode_chat(tokenizer, TWO_TURNS)
    assert encoded.tokens[: encoded.prompt_length].tolist() == encode_prompt(tokenizer, TWO_TURNS[:-1]).tolist()
    assert answers_of(tokenizer, encoded) == ["<think></think> 4, of course.\n<|im_end|>"]
    with pytest.raises(RowError, match=r"changes earlier turns.*; answers='last' may do"):
        encode_chat(tokenizer, TWO_TURNS, "all")
    template = CHATML.replace(
        "+ message.content", "+ ('<t></t>' if loop.last and message.role == 'assistant' else '') + message.content"
    )
    tokenizer = byte_tokenizer(template=template)
    assert answers_of(tokenizer, encode_chat(tokenizer, TWO_TURNS)) == ["<t></t> 4, of course.\n<|im_end|>"]
    with pytest.raises(RowError, match=r"changes earlier turns.*; answers='last' may do"):
        encode_chat(tokenizer, TWO_TURNS, "all")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (TWO_TURNS[:2], "no assistant turn answers anything"),
        (TWO_TURNS[2:3], "no assistant turn answers anything"),
        ([TWO_TURNS[1], {"role": "assistant", "content": " "}], r"the answer \(message 1\) is empty"),
        ([TWO_TURNS[1], {"role": "assistant", "content": None}], r"the answer \(message 1\) is empty"),
        ([], "the conversation is empty"),
    ],
)
def test_conversations_without_an_answer(tokenizer: Any, messages: list[Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        encode_chat(tokenizer, messages)


@pytest.mark.parametrize(
    ("role", "extra", "reason"),
    [
        ("developer", {}, "the chat template leaves out message 0 of role 'developer'"),
        ("assistant", {"tool_calls": [{"name": "sky"}]}, "the chat template leaves out the tool call of message 0"),
    ],
)
def test_nothing_is_left_out_silently(role: str, extra: dict[str, Any], reason: str) -> None:
    template = CHATML.replace("message.content }}", "(message.content if message.role != 'developer' else '') }}")
    tokenizer = byte_tokenizer(template=template.replace("call.function | tojson", "''"))
    with pytest.raises(RowError, match=reason):
        encode_chat(tokenizer, [{"role": role, "content": "Pirate talk.", **extra}, *TWO_TURNS[1:3]])


def test_a_template_that_refuses() -> None:
    tokenizer = byte_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RowError, match=r"the chat template refuses it \(roles must alternate\)"):
        encode_chat(tokenizer, TWO_TURNS)


def test_tokenizers_that_will_not_do() -> None:
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        encode_chat(byte_tokenizer(template=None), TWO_TURNS)
    with pytest.raises(UserError, match="the tokenizer has no EOS token"):
        encode_chat(byte_tokenizer(eos=None), TWO_TURNS)
    with pytest.raises(UserError, match="answers='first'"):
        encode_chat(byte_tokenizer(), TWO_TURNS, "first")


def test_text_ends_in_eos_unless_it_goes_on(tokenizer: Any) -> None:
    (encoded,) = encode_texts(tokenizer, ["Höhe"], [True], [True])
    assert encoded.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.tokens[:-1]) == "Höhe"
    assert not encoded.answer_mask.any()
    assert encode_texts(tokenizer, ["Höhe"], [False], [True])[0].tokens.tolist() == encoded.tokens[:-1].tolist()


def test_a_document_in_several_pieces_begins_once(tmp_path: Path) -> None:
    """Tokenizers that add BOS put one before every text, and a document is tokenised in pieces of 64 KB."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    special = [("<|im_start|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, special)
    (tmp_path / "a.txt").write_text("a line of text\n" * 10_000 + "<|endoftext|>\nanother\n")
    options = Options("pretrain", 4096, "last", "cut", 0.0, None, False, 0)
    source = open_source(str(tmp_path / "a.txt"))
    made = [e for chunk in examples(source, tokenizer, options, Report("a")) for e in chunk]
    tokens = np.concatenate([example.encoded.tokens for example in made])
    assert (tokens == tokenizer.bos_token_id).sum() == (tokens == tokenizer.eos_token_id).sum() == 2


def test_windows_hold_the_text() -> None:
    encoded = Encoded(np.arange(10, dtype=np.int32), np.zeros(10, bool))
    assert [part.tokens.tolist() for part in windows(encoded, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def row(prompt: int, answer: int) -> Encoded:
    mask = np.arange(prompt + answer) >= prompt
    return Encoded(np.arange(prompt + answer, dtype=np.int32), mask)


@pytest.mark.parametrize(
    ("prompt", "answer", "kept"),
    [
        (4, 6, (0, 10)),  # fits
        (4, 20, (0, 10)),  # the whole prompt; the end of the answer is cut
        (5, 6, (0, 10)),
        (8, 4, (2, 12)),  # the whole answer; the prompt is cut from the left
        (8, 20, (3, 13)),  # both are longer than half: half of each
        (100, 1, (91, 101)),
    ],
)
def test_cut(prompt: int, answer: int, kept: tuple[int, int]) -> None:
    assert cut(row(prompt, answer), 10).tokens.tolist() == list(range(*kept))


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(2, 40))
def test_cut_keeps_the_rules_for_any_answers(mask: list[bool], max_length: int) -> None:
    whole = Encoded(np.arange(len(mask), dtype=np.int32), np.array(mask))
    kept = cut(whole, max_length)
    assert 0 < len(kept.tokens) <= max_length
    np.testing.assert_array_equal(np.diff(kept.tokens), 1)  # a contiguous part of the row
    np.testing.assert_array_equal(kept.answer_mask, whole.answer_mask[kept.tokens])
    if len(mask) <= max_length:
        assert kept is whole
    elif any(mask):
        assert whole.prompt_length in kept.tokens  # the first answer begins within it
        assert kept.answer_mask[-1]
        room = max_length - whole.prompt_length
        if room >= max_length / 2:
            assert kept.tokens[0] == 0
        assert cut(whole, max_length, "drop") is None
    else:
        assert kept.tokens[0] == 0


def test_qwen_prompts_equal_published_vectors(qwen: Any, shared_data: Path) -> None:
    vectors = json.loads((shared_data / "qwen_tokenizer/vectors/chat_vectors.json").read_text())
    checked = 0
    for vector in vectors:
        if "2507" in vector["template"]:
            assert encode_prompt(qwen, vector["messages"]).tolist() == vector["ids"]
            checked += 1
    assert checked


def test_qwen_answers_of_real_rows(qwen: Any, shared_data: Path) -> None:
    """The marked tokens are the answer in the file and its end; the rest is the prompt of generation."""
    rows = list(open_source(str(shared_data / "chat/gsm8k_test.jsonl")).rows())[:200]
    for question, answer in ((r["question"], r["answer"]) for r in (row.load() for row in rows)):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        encoded = encode_chat(qwen, messages)
        assert qwen.decode(encoded.tokens[encoded.answer_mask]) == f"{answer}<|im_end|>"
        assert encoded.tokens[~encoded.answer_mask].tolist() == encode_prompt(qwen, messages[:1]).tolist()
        whole = qwen.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert encoded.tokens.tolist() == whole[:-1]  # without the newline after the end


def test_qwen_tool_dialogues(qwen: Any, shared_data: Path) -> None:
    first = next(open_source(str(shared_data / "chat/tau_bench_airline_messages.jsonl")).rows()).load()
    encoded = encode_chat(qwen, first["messages"], "all")
    answers = answers_of(qwen, encoded)
    turns = [m for m in first["messages"] if m["role"] == "assistant"]
    assert len(answers) == len(turns) > 3
    for answer, turn in zip(answers, turns, strict=True):
        assert answer.startswith(turn["content"] or "<tool_call>")
        assert answer.endswith("<|im_end|>")
        for call in turn.get("tool_calls") or ():
            assert f'"name": "{call["function"]["name"]}"' in answer


def test_thinking_template_of_qwen3(qwen: Any, shared_data: Path) -> None:
    thinking = byte_tokenizer(template=(shared_data / "qwen3_configs/Qwen3-0.6B/chat_template.jinja").read_text())
    assert answers_of(thinking, encode_chat(thinking, TWO_TURNS)) == [
        "<think>\n\n</think>\n\n 4, of course.\n<|im_end|>"
    ]
    with pytest.raises(RowError, match="changes earlier turns"):
        encode_chat(thinking, TWO_TURNS, "all")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "user", "content": "\ud800"}], "its text is not Unicode"),
        ({"messages": [{"role": "user", "content": "Q"}], "chat_template_kwargs": "x"}, "chat_template_kwargs is not"),
        (
            {"messages": [{"role": "user", "content": "Q"}], "chat_template_kwargs": {"tools": []}},
            "is not an object of",
        ),
        (None, "a prompt is a text, messages or tokens, not NoneType"),
    ],
)
def test_a_prompt_that_cannot_be_rendered_is_one_line(prompt: Any, message: str) -> None:
    """Regression: these ended in a traceback of transformers or jinja2."""
    tokenizer = byte_tokenizer()
    with pytest.raises(UserError, match=message):
        Prompts(tokenizer, len(tokenizer), -1).prompt(prompt)
