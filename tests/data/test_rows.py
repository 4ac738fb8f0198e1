"""Tests that rows of known formats mean what their own library reads, and that no key is dropped silently."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difflm_jax.data import keys
from difflm_jax.data.columns import parse_naming
from difflm_jax.data.examples import Options, Report, examples
from difflm_jax.data.formats import FORMATS, Conversation, parse_row
from difflm_jax.data.keys import MESSAGE_KEYS, REFUSED, ROW_KEYS, USED, Notes
from difflm_jax.data.rows import RowError
from difflm_jax.data.sources import open_source
from difflm_jax.data.template_forms import read_template
from difflm_jax.data.tokenised import tokenize
from difflm_jax.errors import UserError
from tests.byte_tokenizer import CHATML, byte_tokenizer
from tests.data.cases import case_ids, cases, markdown

ROWS = cases("rows")
QA = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
MARKED = CHATML.replace(
    "{{- '<|im_start|>' + message.role + '\\n' + message.content }}",
    "{{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{{ message.content }}",
).replace("{{- '<|im_end|>\\n' }}", "{{- '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}")


def messages_of(right: list[Any]) -> list[dict[str, Any]]:
    return [each if isinstance(each, dict) else dict(zip(("role", "content"), each, strict=True)) for each in right]


@pytest.mark.parametrize("case", ROWS, ids=case_ids(ROWS))
def test_a_row_means_what_its_library_makes_of_it(case: Any) -> None:
    _, conversation = parse_row(case.given)
    assert conversation.messages == messages_of(case.right)
    assert conversation.tools == case.options.get("tools")


@pytest.mark.parametrize("case", ROWS, ids=case_ids(ROWS))
def test_tokens_and_answer_mask_are_those_of_transformers(case: Any, jsonl: Callable[..., str], tmp_path: Path) -> None:
    """Oracle: `apply_chat_template` with `{% generation %}`, as TRL's assistant_only_loss uses it."""
    dataset = tokenize(jsonl([case.given]), byte_tokenizer(), Options("sft", 4096, answers="all"), tmp_path / "cache")
    oracle = byte_tokenizer(template=MARKED)
    tools = case.options.get("tools")
    right = oracle.apply_chat_template(
        messages_of(case.right), tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens = dataset[0]["tokens"]
    assert tokens == right["input_ids"][: len(tokens)]
    if messages_of(case.right)[-1]["role"] == "assistant":
        assert oracle.decode(right["input_ids"][len(tokens) :]) == "\n"
    expected = answers_only(oracle, messages_of(case.right), tools)
    assert dataset[0]["answer_mask"] == expected[: len(tokens)]


def answers_only(oracle: Any, messages: list[dict[str, Any]], tools: Any) -> list[bool]:
    """Returns the mask of the assistant's turns: the tokens that rendering each turn adds, without its header."""
    mask: list[bool] = []
    for i, message in enumerate(messages):
        whole = oracle.apply_chat_template(
            messages[: i + 1], tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        added = whole["assistant_masks"][len(mask) :]
        mask += [bool(m) and message["role"] == "assistant" for m in added]
    return mask


# (row, what is announced): used keys are in rows.yaml.
ANNOUNCED = [
    ({"messages": QA, "label": False}, "label is not used (undesired answers are trained like the others)"),
    ({"messages": QA, "text": "t"}, "text is not used"),
    ({"messages": QA, "anything": 1}, "anything is not used"),
    ({"messages": QA, "documents": ["d"]}, "documents is not used (not given to the chat template)"),
    ({"messages": [{"role": "system", "content": "T"}, *QA], "system": "S"}, "system is not used"),
    ({"prompt": "Q", "completion": "A", "chosen": "B"}, "chosen is not used (preferences are not trained)"),
    ({"messages": [QA[0], QA[1] | {"mood": "good"}]}, "mood of messages is not used"),
    ({"messages": [QA[0] | {"weight": 1}, QA[1]]}, "weight of messages that are no answers is not used"),
    (
        {"messages": [QA[0], QA[1] | {"thinking": "T", "reasoning": "R"}]},
        "thinking of messages is not used next to reasoning",
    ),
    ({"question": "Q", "answers": ["A", "B"]}, "answers after the first are not used"),
    ({"problem": "Q", "solution": "A", "answer": "4"}, "answer is not used"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "announced"), ANNOUNCED, ids=[announced for _, announced in ANNOUNCED])
def test_a_key_that_is_not_used_is_announced(row: dict[str, Any], announced: str) -> None:
    notes = Notes()
    parse_row(row, notes=notes)
    assert announced in notes


@pytest.mark.parametrize(
    ("row", "format", "turns"),
    [
        ({"messages": [], "question": "Q", "answer": "A"}, "question/answer", ["Q", "A"]),
        ({"conversations": [], "prompt": "Q", "response": "A"}, "prompt/response", ["Q", "A"]),
        ({"instruction": "", "input": "Q", "output": "A"}, "input/output", ["Q", "A"]),
        ({"prompt": "Q", "response": "", "completion": "A"}, "prompt/completion", ["Q", "A"]),
    ],
)
def test_an_empty_value_is_no_value_when_the_format_is_chosen(
    row: dict[str, Any], format: str, turns: list[str]
) -> None:
    """Regression: `messages: []` next to a question refused the row, and an empty instruction added newlines."""
    name, conversation = parse_row(row)
    assert name == format
    assert [message["content"] for message in conversation.messages] == turns


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": QA, "images": ["a.png"]}, "has images: the model reads text only"),
        ({"prompt": "<image>Q", "response": "A", "image": "a.png"}, "has image: the model reads text only"),
        ({"messages": [QA[0] | {"images": ["a"]}, QA[1]]}, "message 0 has images: the model reads text only"),
        ({"messages": [QA[0], QA[1] | {"train_detail": [1]}]}, "message 1 has train_detail: parts of an answer"),
        ({"messages": [QA[0], {"role": "assistant", "content": None, "refusal": "No."}]}, "message 1 has refusal"),
        ({"messages": [QA[0], QA[1] | {"weight": 0.5}]}, r"weight of message 1 is 0\.5: it must be 0 or 1"),
        ({"messages": [QA[0], QA[1] | {"value": "B"}]}, "message 1 has more than one of content, value, text"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preferences are not trained: data.columns=response=chosen"),
        ({"question": "Q", "answers": {"text": []}}, "answers is not a list with an answer"),
        ({"question": "Q", "choices": 3, "answer": "A"}, "choices is not a list of texts"),
        ({"question": "Q", "choices": ["a", "b"], "answer": 2}, "answer is 2, and there are 2 choices, from 0"),
        ({"question": "Q", "answer": ["A", "B"]}, "answer is a list, not a text"),
        ({"instruction": "Q", "output": "A", "history": ["q"]}, r"history is not a list of \[question, answer\]"),
        ({"messages": QA, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs is not an object"),
        ({"messages": {"role": ["user"], "content": []}}, "messages is an object of lists of different lengths"),
        (
            {"messages": [QA[0], {"role": "assistant", "content": [{"type": "reasoning"}]}]},
            "content of message 1 has a part of type 'reasoning' without text under reasoning, text, value",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_row(row)


def test_unused_keys_are_said_once_with_a_count(
    jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [QA[0], QA[1] | {"reasoning_content": "T"}], "id": i} for i in range(3)]
    name = jsonl([*rows, {"question": "Q", "answer": "A", "label": True}])
    tokenize(name, byte_tokenizer(), Options("sft", 64), tmp_path / "cache")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert (
        "; id is not used (in 3), reasoning_content is not shown by the chat template (in 3), label is not used ("
        in out
    )


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
def test_an_answer_of_weight_0_is_context(key: str, jsonl: Callable[..., str], tmp_path: Path) -> None:
    other = [{"role": "user", "content": "R"}, {"role": "assistant", "content": "B"}]
    first, last = ([*QA[:1], QA[1] | {key: 0}, *other], [*QA, other[0], other[1] | {key: 0}])
    tokenizer = byte_tokenizer()

    def answers(row: list[Any], which: str) -> str:
        name = jsonl([{"messages": row}], f"{key}.jsonl")
        options = Options("sft", 256, answers=which)
        found = tokenize(name, tokenizer, options, tmp_path / "cache").with_format("numpy")[0]
        return tokenizer.decode(found["tokens"][found["answer_mask"]])

    assert answers(first, "all") == "B<|im_end|>"
    assert answers(last, "all") == answers(last, "last") == "A<|im_end|>"
    with pytest.raises(UserError, match="no answer is to be trained: each has weight 0"):
        answers([QA[0], QA[1] | {key: 0}], "all")


def test_own_names_of_columns_and_roles(jsonl: Callable[..., str], tmp_path: Path) -> None:
    naming = parse_naming("prompt=frage, response=antwort,system=lage", "user=Kunde,assistant=Berater")
    row = {"frage": "Q", "antwort": "A", "lage": "S", "response": "old"}
    assert parse_row(row, naming)[1].messages == [{"role": "system", "content": "S"}, *QA]
    turns = {"messages": [{"from": "Kunde", "value": "Q"}, {"from": "Berater", "value": "A"}]}
    assert parse_row(turns, naming)[1].messages == QA
    name = jsonl([{"frage": "Q", "antwort": "A"}])
    named, plain = Options("sft", 64, columns="prompt=frage,response=antwort"), Options("sft", 64)
    assert len(tokenize(name, byte_tokenizer(), named, tmp_path / "cache")) == 1
    with pytest.raises(UserError, match=r"other names are mapped by data\.columns"):
        tokenize(name, byte_tokenizer(), plain, tmp_path / "cache")


@pytest.mark.parametrize(
    ("columns", "roles", "reason"),
    [
        ("prompt", "", "data.columns: 'prompt' is not written known=own"),
        ("a=x,b=x", "", "data.columns: names something twice"),
        ("", "robot=R", "data.roles: 'robot' is no role; known: system, developer, user, assistant, tool"),
    ],
)
def test_names_that_are_not_written_right(columns: str, roles: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_naming(columns, roles)


def test_a_chat_template_is_a_file_or_text(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(MARKED)
    assert read_template(str(tmp_path / "t.jinja")) == read_template(MARKED) == MARKED
    for wrong, reason in (("nosuch.jinja", "cannot be read"), ("{% for %}", "is not a Jinja template")):
        with pytest.raises(UserError, match=reason):
            read_template(wrong)


# The fuzzer builds rows from known keys and a few unknown ones, with values of right and wrong types.
VALUE = st.one_of(
    st.sampled_from(["Q", "A", "", "user", "gpt", "[]", '{"name": "f"}', 0, 1, False, None, 0.5]),
    st.lists(st.sampled_from(["x", None, {"type": "text", "text": "t"}, {"type": "image"}, ["q", "a"]]), max_size=2),
    st.dictionaries(st.sampled_from(["name", "arguments", "text", "label", "f"]), st.just("x"), max_size=2),
)
MESSAGE = st.one_of(
    st.builds(
        lambda more, speaker, text: {speaker[0]: speaker[1], text: "some words"} | more,
        st.dictionaries(st.sampled_from([*MESSAGE_KEYS, "odd"]), VALUE, max_size=2),
        st.sampled_from([("role", "user"), ("role", "assistant"), ("from", "gpt"), ("from", "human"), ("role", "odd")]),
        st.sampled_from(["content", "value"]),
    ),
    VALUE,
)
NEEDED = sorted({key for format in FORMATS for key in format.needed})
ROW = st.builds(
    lambda turns, plain, more: turns | plain | more,
    st.dictionaries(st.sampled_from(["messages", "conversations"]), st.lists(MESSAGE, max_size=4), max_size=1),
    st.lists(st.sampled_from(NEEDED), max_size=3).map(lambda names: {name: f"the {name}" for name in names}),
    st.dictionaries(st.sampled_from([*ROW_KEYS, "odd", "id"]), VALUE, max_size=3),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(ROW)
def test_every_key_of_any_row_is_used_announced_or_refused(row: dict[str, Any]) -> None:
    """A key is used if without it the row means something else, or nothing."""
    notes = Notes()
    try:
        name, found = parse_row(row, notes=notes)
    except RowError as error:
        assert "\n" not in str(error)
        return
    for key in row:
        twice = list(row.values()).count(row[key]) > 1  # system and system_prompt that agree
        if says(key, row[key]) and not twice and not any(note.split()[0] == key for note in notes):
            assert differs(without(row, key), found), key
    if name in ("messages", "conversations"):
        for i, message in enumerate(row[name]):
            for key in message:
                twice = list(message.values()).count(message[key]) > 1  # content and value that agree
                if (
                    says(key, message[key])
                    and not twice
                    and not any(note.startswith(f"{key} of messages") for note in notes)
                ):
                    changed = [*row[name][:i], without(message, key), *row[name][i + 1 :]]
                    assert differs(row | {name: changed}, found), (key, message)


def says(key: str, value: Any) -> bool:
    """Whether the value of a key has an effect. An empty list as text has none, nor a weight of 1."""
    return keys.is_given(value) and value != "[]" and not (key in ("weight", "train", "training", "loss") and value)


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


def differs(row: dict[str, Any], found: Conversation | str) -> bool:
    try:
        return parse_row(row)[1] != found
    except RowError:
        return True


def test_the_tables_name_a_use_and_a_source_for_every_key() -> None:
    for key, known in (ROW_KEYS | MESSAGE_KEYS).items():
        assert known.use in (USED, keys.ANNOUNCED, REFUSED), key
        assert known.source.startswith("https://"), key


def test_the_page_on_compatibility_is_made_from_the_tables(pytestconfig: pytest.Config) -> None:
    """`python -m tests.data.cases > docs/compatibility.md` regenerates it."""
    assert (pytestconfig.rootpath / "docs" / "compatibility.md").read_text("utf-8") == markdown()


def test_examples_of_a_thinking_template_are_one_for_each_answer(jsonl: Callable[..., str]) -> None:
    """Qwen3's template shows only the last turn's thoughts, so no single text has all that generation sees."""
    template = CHATML.replace(
        "+ message.content", "+ ('<t></t>' if loop.last and message.role == 'assistant' else '') + message.content"
    )
    tokenizer = byte_tokenizer(template=template)
    source = open_source(jsonl([{"messages": [*QA, *QA]}]))
    report = Report("rows")
    (made,) = examples(source, tokenizer, Options("sft", 512, "all", "cut", 0.0, None, False, 0), report)
    spelt = [tokenizer.decode(example.encoded.tokens[example.encoded.answer_mask]) for example in made]
    assert spelt == ["<t></t>A<|im_end|>"] * 2
    assert report.notes == {"the chat template changes earlier turns: one example per answer": 1}
    assert json.loads(json.dumps(report.formats)) == {"messages": 1}


def test_options_of_a_column_of_structs_have_nulls() -> None:
    """If rows have fewer options than others, arrow fills the struct with nulls."""
    row = {"question": "Q", "answer": "A", "options": {"A": "x", "B": "y", "C": None}}
    assert parse_row(row, parse_naming("", ""))[1].messages[0]["content"] == "Q\nA. x\nB. y"


def test_two_columns_for_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="names something twice"):
        parse_naming("response=a,response=b", "")
