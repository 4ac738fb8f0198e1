"""Tests that rows are tokenised to disk once, and that bad rows are named and counted; too many are an error."""

import concurrent.futures
import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import normalizers

from difflm_jax.data import fingerprint, tokenised
from difflm_jax.data.chat import encode_chat
from difflm_jax.data.examples import Options, examples
from difflm_jax.data.tokenised import tokenize
from difflm_jax.errors import UserError
from tests.byte_tokenizer import CHATML, byte_tokenizer

GOOD = {"question": "Q?", "answer": "An answer."}


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any) -> Callable[..., Any]:
    """Calls `tokenize` with the test's own cache and default options."""

    def call(dataset: str, **options: Any) -> Any:
        own, folder = options.pop("tokenizer", tokenizer), options.pop("cache_dir", tmp_path / "cache")
        return tokenize(dataset, own, Options(**{"phase": "sft", "max_length": 128} | options), folder)

    return call


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "difflm_jax").iterdir())


def test_rows_of_all_formats_in_one_file(
    make: Callable[..., Any], jsonl: Callable[..., str], tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "An answer."}]
    rows = [
        GOOD,
        {"messages": messages},
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "An answer."}]},
        {"prompt": "Q?", "response": "An answer."},
        {"prompt": "Q?", "completion": "An answer."},
        {"instruction": "Q?", "input": "", "output": "An answer."},
        {"text": "Plain."},
    ]
    name = jsonl(rows)
    dataset = make(name, phase="pretrain")
    expected = encode_chat(tokenizer, messages)
    for row in dataset.select(range(6)):
        assert row["tokens"] == expected.tokens.tolist()
        assert row["answer_mask"] == expected.answer_mask.tolist()
    assert tokenizer.decode(dataset[6]["tokens"]) == "Plain.<|im_end|>"
    assert not any(dataset[6]["answer_mask"])
    assert dataset["origin"][:] == [f"{name}:{i}" for i in range(1, 8)]
    assert len(set(dataset["content_hash"])) == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"data: {name}: 7 examples from 7 rows (1 question/answer, 1 messages, 1 conversations, " in out
    assert "1 prompt/response, 1 prompt/completion, 1 alpaca, 1 text); kept in" in out


BAD_ROWS = {
    "bad JSON": (b'{"question": "Q"', "not JSON"),
    "invalid UTF-8": (b'{"question": "\xff"}', "not UTF-8"),
    "no object": (["Q", "A"], "is a list, not an object"),
    "unknown keys": ({"query": "Q"}, "has the keys query; known formats"),
    "empty conversation": ({"messages": []}, "the conversation is empty"),
    "no assistant turn": ({"messages": [{"role": "user", "content": "Q"}]}, "no assistant turn answers anything"),
    "unknown role": ({"messages": [{"role": "robot", "content": "Q"}]}, "message 0 has the unknown role 'robot'"),
    "wrong content": ({"messages": [{"role": "user", "content": 1}]}, "content of message 0 is an int, not a text"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type 'image_url'"),
    "empty answer": ({"question": "Q", "answer": ""}, "the answer (message 1) is empty"),
    "null answer": ({"question": "Q", "answer": None}, "has the keys question; known formats"),
    "wrong answer": ({"question": "Q", "answer": 42}, "answer is an int, not a text"),
    "text": ({"text": "Plain."}, "plain text has no answer"),
    "half a surrogate pair": (b'{"question": "\\ud83d", "answer": "A"}', "its text is not Unicode"),
    "refused by the template": ({"question": "REFUSE", "answer": "A"}, "the chat template refuses it (no)"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_and_left_out(
    kind: str, make: Callable[..., Any], jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% if 'REFUSE' in messages[0].content %}{{ raise_exception('no') }}{% endif %}" + CHATML
    tokenizer = byte_tokenizer(template=template)
    bad, reason = BAD_ROWS[kind]
    name = jsonl([GOOD, GOOD, bad, GOOD])
    with pytest.raises(UserError) as caught:
        make(name, tokenizer=tokenizer)
    message = str(caught.value)
    assert message.startswith(f"{name}: 1 of 4 rows are bad, more than bad_row_budget=0.01 allows: {name}:3: ")
    assert reason in message
    assert "\n" not in message
    assert cached(tmp_path) == []  # nothing half-written
    capsys.readouterr()
    dataset = make(name, tokenizer=tokenizer, bad_row_budget=0.25)
    assert dataset["origin"][:] == [f"{name}:{line}" for line in (1, 2, 4)]
    assert f"1 bad rows left out: {name}:3: {reason[:20]}"[:60] in capsys.readouterr().out


def test_a_text_without_tokens_is_bad(make: Callable[..., Any], jsonl: Callable[..., str]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    name = jsonl([{"text": "xxx"}, {"text": "y"}])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: gives no tokens"):
        make(name, tokenizer=tokenizer, phase="pretrain")


def test_the_first_few_of_many_bad_rows_are_listed(make: Callable[..., Any], jsonl: Callable[..., str]) -> None:
    name = jsonl([GOOD] * 3 + [{}] * 17)
    with pytest.raises(UserError, match=r"17 of 20 rows are bad.*rows\.jsonl:8: .*; and 12 more$"):
        make(name, bad_row_budget=0.5)


def test_the_budget_is_a_share_of_the_rows(make: Callable[..., Any], jsonl: Callable[..., str]) -> None:
    assert len(make(jsonl([GOOD] * 99 + [{}]))) == 99
    with pytest.raises(UserError, match="2 of 100 rows are bad"):
        make(jsonl([GOOD] * 98 + [{}] * 2))


def test_nothing_to_use(make: Callable[..., Any], jsonl: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="holds no rows"):
        make(jsonl([]))
    with pytest.raises(UserError, match=r"none of its 1 rows is left: .*rows\.jsonl:1: has the keys"):
        make(jsonl([{}]), bad_row_budget=1.0)
    with pytest.raises(UserError, match="none of its 2 rows is left: 2 are longer than max_length"):
        make(jsonl([GOOD, GOOD]), max_length=8, overlong="drop")


def test_a_row_with_the_mask_token_is_an_error_of_its_own(
    make: Callable[..., Any], jsonl: Callable[..., str], tokenizer: Any
) -> None:
    name = jsonl([GOOD, {"question": "Q", "answer": "a <|mask|> b"}])
    mask_id = tokenizer.convert_tokens_to_ids("<|mask|>")
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: holds the mask token \(id {mask_id}\)"):
        make(name, mask_token_id=mask_id, bad_row_budget=1.0)
    assert len(make(name)) == 2


def test_long_rows_are_cut_or_dropped_and_counted(
    make: Callable[..., Any], jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = jsonl([GOOD, {"question": "Q" * 500, "answer": "A"}, {"question": "Q", "answer": "A" * 500}])
    dataset = make(name, max_length=100)
    assert [len(row) for row in dataset["tokens"]] == [len(dataset[0]["tokens"]), 100, 100]
    assert all(any(mask) for mask in dataset["answer_mask"])
    assert "2 cut to max_length" in capsys.readouterr().out
    assert len(make(name, max_length=100, overlong="drop")) == 1
    assert "2 dropped as longer than max_length" in capsys.readouterr().out


def test_pretraining_takes_texts_in_windows_and_questions_alone(
    make: Callable[..., Any], jsonl: Callable[..., str], tokenizer: Any
) -> None:
    text = "0123456789" * 10
    name = jsonl([{"text": text}, {"messages": [{"role": "user", "content": "Q?"}]}])
    dataset = make(name, phase="pretrain", max_length=30)
    assert [len(row) for row in dataset["tokens"]][:4] == [30, 30, 30, 11]
    assert tokenizer.decode([token for row in dataset["tokens"][:4] for token in row]) == text + "<|im_end|>"
    assert tokenizer.decode(dataset[4]["tokens"]) == "<|im_start|>user\nQ?<|im_end|>"
    assert len(set(dataset["content_hash"][:4])) == 1  # all windows of a text are on one side of a split
    assert not any(any(mask) for mask in dataset["answer_mask"])


def test_every_assistant_turn(make: Callable[..., Any], jsonl: Callable[..., str], tokenizer: Any) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    name = jsonl([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    for answers, spelt in (("last", "d<|im_end|>"), ("all", "b<|im_end|>d<|im_end|>")):
        row = make(name, answers=answers).with_format("numpy")[0]
        assert tokenizer.decode(row["tokens"][row["answer_mask"]]) == spelt


def test_debug_takes_a_seeded_hundred(make: Callable[..., Any], jsonl: Callable[..., str]) -> None:
    name = jsonl([{"question": f"{i}?", "answer": "A"} for i in range(300)])
    first, again, other = make(name, debug=True), make(name, debug=True), make(name, debug=True, seed=7)
    assert len(set(first["origin"])) == len(first) == len(other) == 100
    assert first["origin"][:] == again["origin"][:] != other["origin"][:]
    lines = sorted(int(origin.rpartition(":")[2]) for origin in first["origin"])
    assert 100 < np.mean(lines) < 200  # not the first hundred
    text = jsonl([{"text": "x" * 10_000}], "text.jsonl")
    assert len(make(text, debug=True, phase="pretrain", max_length=8)) == 100


def test_the_cache_is_used_again_and_follows_every_change(
    make: Callable[..., Any],
    jsonl: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = jsonl([GOOD, GOOD | {"answer": "Another."}])
    first = make(name, seed=1)
    assert "kept in" in capsys.readouterr().out

    with monkeypatch.context() as patch:
        patch.setattr(tokenised, "examples", None)  # fails if rows are read
        again = make(name, seed=2)
    assert again[:] == first[:]
    assert "2 examples from 2 rows (2 question/answer); reused from" in capsys.readouterr().out

    changes: list[dict[str, Any]] = [
        {"phase": "pretrain"},
        {"max_length": 64},
        {"answers": "all"},
        {"overlong": "drop"},
        {"bad_row_budget": 0.5},
        {"mask_token_id": 3},
        {"debug": True},
        {"tokenizer": byte_tokenizer(template="{# other #}" + CHATML)},
        {"tokenizer": byte_tokenizer((("A", "n"),))},
        {"tokenizer": byte_tokenizer(eos="<|pad|>")},
    ]
    for i, change in enumerate(changes):
        make(name, **change)
        assert "kept in" in capsys.readouterr().out, change
        assert len(cached(tmp_path)) == i + 2
    jsonl([GOOD])
    assert len(make(name)) == 1


def test_the_cache_forgets_what_a_tokenizer_was_last_used_for(
    make: Callable[..., Any], jsonl: Callable[..., str], tmp_path: Path
) -> None:
    name, tokenizer = jsonl([GOOD]), byte_tokenizer()
    make(name, tokenizer=tokenizer)
    tokenizer(["a", "bbb"], padding=True, truncation=True, max_length=2)
    make(name, tokenizer=tokenizer)
    assert len(cached(tmp_path)) == 1


def test_another_process_may_make_the_same_meanwhile(
    make: Callable[..., Any], jsonl: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = jsonl([GOOD])

    def slow_examples(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(tokenised, "examples", examples)
            patch.setattr(tokenised, "locked", contextlib.nullcontext)  # a file system without locks
            others.append(make(name))
        return examples(*args)

    others: list[Any] = []
    monkeypatch.setattr(tokenised, "examples", slow_examples)
    assert make(name)[:] == others[0][:]
    assert len(cached(tmp_path)) == 1


def test_a_damaged_cache_is_made_again_and_said_once(
    make: Callable[..., Any], jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: after a loss of power, a truncated file made every later start end in a traceback."""
    name = jsonl([GOOD, GOOD])
    whole = make(name)[:]
    (stored,) = (tmp_path / "cache" / "difflm_jax").iterdir()
    data = (stored / "rows.arrow").read_bytes()
    for damage in (data[: len(data) // 2], b""):
        (stored / "rows.arrow").write_bytes(damage)
        capsys.readouterr()
        assert make(name)[:] == whole
        assert capsys.readouterr().out.count("is damaged (rows.arrow has") == 1
    (stored / "summary.json").write_text("{")
    assert make(name)[:] == whole
    capsys.readouterr()
    assert make(name)[:] == whole and "made again" not in capsys.readouterr().out


def test_a_full_disk_while_tokenising_is_one_line(
    make: Callable[..., Any], jsonl: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenised, "_write_rows", full)
    with pytest.raises(UserError, match=r"tokenised rows cannot be written there .*No space left on device"):
        make(jsonl([GOOD]))
    assert cached(tmp_path) == []


def test_a_folder_that_cannot_be_written_and_a_file_that_cannot_be_read_are_told_apart(
    make: Callable[..., Any], jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> Any:
        raise OSError(5, "Input/output error")
        yield

    name = jsonl([GOOD])
    with monkeypatch.context() as patch:
        patch.setattr(tokenised, "examples", unreadable)
        with pytest.raises(UserError, match=r"rows.*\.jsonl: cannot be read \(.*Input/output error\)$"):
            make(name)

    def read_only(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tokenised.tempfile, "TemporaryDirectory", read_only)
    with pytest.raises(UserError, match=r"difflm_jax: tokenised rows cannot .*Read-only file system\); .*cache_dir"):
        make(name)


def test_of_two_starts_one_tokenises(
    make: Callable[..., Any], jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock belongs to an open file, so threads can stand in for processes here."""
    made = []

    def slow(*arguments: Any) -> Any:
        made.append(1)
        time.sleep(0.3)
        return examples(*arguments)

    monkeypatch.setattr(tokenised, "examples", slow)
    name = jsonl([GOOD])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda tokenizer: make(name, tokenizer=tokenizer)[:], [byte_tokenizer()] * 2)
    assert first == second and made == [1]


def test_a_large_file_is_read_whole_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_SMALL", 100)
    monkeypatch.setattr(fingerprint, "_SETTLED", -1.0)
    path, read = tmp_path / "rows.txt", []
    plain = fingerprint.hashlib.file_digest
    monkeypatch.setattr(fingerprint.hashlib, "file_digest", lambda *a: read.append(1) or plain(*a))
    path.write_bytes(b"a" * 1_000_000)
    first = fingerprint.file_hash(path)
    assert fingerprint.file_hash(path) == first and len(read) == 1
    times = path.stat()
    with path.open("r+b") as file:  # a change between the samples, with equal size and restored times
        file.seek(123_456)
        file.write(b"b")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint.file_hash(path) != first and len(read) == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"phase": "train"}, "phase='train': must be one of pretrain, sft"),
        ({"answers": "first"}, "answers='first': must be one of last, all"),
        ({"overlong": "keep"}, "overlong='keep': must be one of cut, drop"),
        ({"max_length": 1}, "max_length=1: must be at least 2"),
        ({"bad_row_budget": 3}, "bad_row_budget=3: is a share of the rows"),
    ],
)
def test_wrong_options(
    make: Callable[..., Any], jsonl: Callable[..., str], option: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(jsonl([GOOD]), **option)


def test_an_unwritable_cache(make: Callable[..., Any], jsonl: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the cache of tokenised data cannot be made there"):
        make(jsonl([GOOD]), cache_dir=tmp_path / "file")


@pytest.mark.parametrize(
    ("file", "rows"),
    [
        ("kto_en_demo.json", 300),
        ("alpaca_en_demo.json", 999),
        ("glaive_toolcall_en_demo.json", 300),
        ("reason_tool_use_demo_50.jsonl", 50),
        ("tau_bench_airline_messages.jsonl", 200),
    ],
)
def test_real_files(file: str, rows: int, make: Callable[..., Any], qwen: Any, shared_data: Path) -> None:
    dataset = make(str(shared_data / "chat" / file), tokenizer=qwen, max_length=768, mask_token_id=151669)
    assert len(dataset) == rows
    assert all(any(mask) for mask in dataset["answer_mask"])
    assert max(map(len, dataset["tokens"])) <= 768


def test_a_real_file_of_no_known_format(make: Callable[..., Any], qwen: Any, shared_data: Path) -> None:
    with pytest.raises(UserError, match=r"175 of 175 rows are bad.*:1: has the keys id, instances, instruction"):
        make(str(shared_data / "chat/self_instruct_seed_tasks.jsonl"), tokenizer=qwen)


def test_rows_are_json_of_any_kind(make: Callable[..., Any], tmp_path: Path) -> None:
    """The same rows in three kinds of file become the same examples."""
    rows = [
        {"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": f"{i}"}]} for i in range(5)
    ]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    made = [make(str(tmp_path / name)).remove_columns("origin")[:] for name in ("r.json", "r.jsonl", "r.parquet")]
    assert made[0] == made[1] == made[2]
