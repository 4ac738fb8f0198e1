"""Tests that every kind of source yields rows with their origins, and reports faults in one line."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from difflm_jax.data.sources import RowError, open_source
from difflm_jax.errors import UserError

ROWS = [{"text": "één"}, {"text": "two", "n": [1, {"a": None}]}, {"text": "three"}]


def read(dataset: str) -> list[tuple[str, object]]:
    return [(row.origin, row.load()) for row in open_source(dataset).rows()]


def texts(dataset: str) -> list[str]:
    return [row.load()["text"] for row in open_source(dataset).rows()]


def test_jsonl_gives_file_and_line_and_skips_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1]), "utf-8")
    assert read(str(path)) == [(f"{path}:1", ROWS[0]), (f"{path}:3", ROWS[1])]


def test_jsonl_bad_lines_fail_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n{"text": "\xff"}\n' + b"[" * 100_000 + b'\n{"text": "b"}\n')
    outcomes = []
    for row in open_source(str(path)).rows():
        try:
            outcomes.append(row.load()["text"])
        except RowError as error:
            outcomes.append(str(error)[:9])
    assert outcomes == ["a", "not JSON ", "not UTF-8", "not JSON ", "b"]


def test_json_list(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=2))
    assert read(str(path)) == [(f"{path}[{i}]", row) for i, row in enumerate(ROWS)]
    path.write_text(" [ ] ")
    assert read(str(path)) == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"text":\n "a"}', "is neither a JSON list of rows nor one JSON object per line"),
        ('[{"text": "a"}, {"text": ', r"a.json\[1\]: the file is not JSON from here on"),
        ('[{"text": "a"} {"text": "b"}]', r"a.json\[0\]: the file is not JSON from here on \(Expecting ',' or '\]'"),
    ],
)
def test_broken_json_names_the_place(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=complaint):
        read(str(tmp_path / "a.json"))


def test_parquet_rows_are_numbered_across_row_groups(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    rows = [{"text": str(i)} for i in range(2500)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    assert read(path) == [(f"{path}[{i}]", row) for i, row in enumerate(rows)]


def test_arguments_keep_the_fields_of_their_own_row(tmp_path: Path) -> None:
    """A parquet column has the fields of all rows; a null that it added must not become an argument to learn."""
    calls = [{"city": "Rome", "at": {"x": 1}}, {"zone": "UTC"}]
    rows = [{"messages": [{"content": None, "function": {"arguments": arguments}}]} for arguments in calls]
    path = str(tmp_path / "a.parquet")
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    assert [row for _, row in read(path)] == rows


def test_a_file_that_only_is_called_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(UserError, match=r"a\.parquet: is not a readable parquet file"):
        read(str(tmp_path / "a.parquet"))


def test_text_is_one_document_in_pieces_of_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    content = "".join(f"line {i} of a long text\n" for i in range(1, 10_001))
    path.write_text(content)
    rows = list(open_source(str(path)).rows())
    assert len(rows) > 2
    assert "".join(row.load()["text"] for row in rows) == content
    assert [row.continues for row in rows] == [True] * (len(rows) - 1) + [False]
    for row in rows:
        assert row.load()["text"].startswith(f"line {row.origin.rpartition(':')[2]} of")


def test_text_documents_are_parted_by_their_end_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\none\nmore\n<|endoftext|>\n\ntwo\n<|endoftext|>\n")
    rows = list(open_source(str(path)).rows())
    assert [(row.origin, row.load()["text"], row.continues) for row in rows] == [
        (f"{path}:2", "one\nmore\n", False),
        (f"{path}:6", "two\n", False),
    ]


def test_bad_text_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(RowError, match=r"not UTF-8 \(invalid start byte in line 3\)"):
        read(str(tmp_path / "a.txt"))


def test_directory_is_read_in_order_and_announces_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "2"}\n')
    (tmp_path / "a.json").write_text('[{"text": "1"}]')
    (tmp_path / "c.txt").write_text("3")
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / "sub").mkdir()
    assert texts(str(tmp_path)) == ["1", "2", "3"]
    assert capsys.readouterr().out == f"data: {tmp_path}: not read: README.md, sub\n"


def test_directory_without_rows(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    with pytest.raises(UserError, match=r"holds no file that ends in \.jsonl, \.json, \.parquet, \.txt"):
        open_source(str(tmp_path))


def test_fingerprint_follows_contents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "1"}\n')
    before = open_source(str(path)).fingerprint
    assert open_source(str(path)).fingerprint == before
    path.write_text('{"text": "2"}\n')
    assert open_source(str(path)).fingerprint != before


@pytest.mark.parametrize("name", ["nosuch.jsonl", "./nosuch", "/nosuch/dir", "a/b/c", "nosuch.csv", "what is this"])
def test_mistyped_path_reads_no_such_file(name: str) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        open_source(name)


def test_mistyped_file_of_a_directory_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    with pytest.raises(UserError, match=r"^data/chats: no such file or directory$"):
        open_source("data/chats")


def test_csv_rows_are_texts_under_the_names_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufeffquestion,answer\n"1, 2?",0003\n"two\nlines",x\n', encoding="utf-8")
    path = str(tmp_path / "a.csv")
    assert read(path) == [
        (f"{path}:2", {"question": "1, 2?", "answer": "0003"}),
        (f"{path}:4", {"question": "two\nlines", "answer": "x"}),
    ]
    rows = 'question\tanswer\n"1, 2?"\tx\n3 "4"\ty\n'
    (tmp_path / "a.tsv").write_text(rows)
    expected = datasets.load_dataset(str(tmp_path), data_files="a.tsv", split="train").to_list()
    assert [row.load() for row in open_source(str(tmp_path / "a.tsv")).rows()] == expected
    (tmp_path / "a.csv").write_text("a,b\nshort\n")
    with pytest.raises(RowError, match="does not have 2 columns"):
        read(path)
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,"2\n')
    with pytest.raises(UserError, match=r"a\.csv:\d+: not CSV"):
        list(open_source(path).rows())
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        list(open_source(path).rows())


def test_unread_ending(tmp_path: Path) -> None:
    (tmp_path / "a.zip").touch()
    with pytest.raises(UserError, match=r"files that end in \.zip are not read; give \.jsonl"):
        open_source(str(tmp_path / "a.zip"))


def test_unknown_builtin_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"builtin:nosuch: no such built-in data set; known: .*quickstart"):
        open_source("builtin:nosuch")


def test_builtin_rows_have_its_name_as_origin() -> None:
    origin, row = read("builtin:quickstart")[0]
    assert origin == "builtin:quickstart:1"
    assert isinstance(row, dict)


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"text": str(i)} for i in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name") == [(f"owner/name[{i}]", {"text": str(i)}) for i in range(3)]
    open_source("owner/name:main@test")
    assert asked == [(("owner/name", None), {"split": "train"}), (("owner/name", "main"), {"split": "test"})]


def test_unreachable_hub_names_the_local_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach\n'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        open_source("owner/name")
    assert "\n" not in str(caught.value)
    assert "owner/name: there is no local file or directory of this name" in str(caught.value)
    assert "give a local .jsonl, .json, .parquet, .csv or .txt file, a directory of these, or builtin:NAME" in str(
        caught.value
    )
