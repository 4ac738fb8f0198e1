"""Tests that a folder yields the rows of `datasets.load_dataset(folder, split=...)` (oracle: datasets 5.2)."""

import gzip
import json
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from difflm_jax.data.sources import open_source
from difflm_jax.data.splits import Part, files_by_split
from difflm_jax.errors import UserError
from tests.data.cases import case_ids, cases

LAYOUTS = cases("splits")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def make(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content or json.dumps({"text": name}) + "\n")


def texts(name: str) -> list[str]:
    return [row.load()["text"] for row in open_source(name).rows()]


@pytest.mark.parametrize("case", LAYOUTS, ids=case_ids(LAYOUTS))
def test_the_same_files_are_of_the_same_split_as_for_datasets(case, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    make(folder, case.given)
    found = {split: sorted(str(path) for path in paths) for split, paths in files_by_split("set", folder).items()}
    assert found == case.right
    oracle = datasets.load_dataset_builder(str(folder)).config.data_files
    listed = {str(s): sorted(str(Path(path).relative_to(folder)) for path in paths) for s, paths in oracle.items()}
    assert found == listed


def test_only_train_is_trained_and_the_rest_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, {"train.jsonl": "", "test.jsonl": "", "validation.jsonl": "", "notes.md": "x"})
    assert texts(str(tmp_path)) == ["train.jsonl"]
    assert texts(f"{tmp_path}@test") == ["test.jsonl"]
    assert texts(f"{tmp_path}@validation+train") == ["validation.jsonl", "train.jsonl"]
    out = capsys.readouterr().out
    assert f"data: {tmp_path}: reads the split train of train (1 file), validation (1 file), test (1 file)\n" in out
    assert f"data: {tmp_path}: not read: notes.md\n" in out


def test_a_folder_without_a_train_split_says_which_there_are(tmp_path: Path) -> None:
    make(tmp_path, {"dev.jsonl": "", "test.jsonl": ""})
    with pytest.raises(
        UserError, match=r"has no split 'train'; there is validation, test \(name it as .*@validation\)"
    ):
        open_source(str(tmp_path))


def test_configurations_of_the_readme_are_named_as_on_the_hub(tmp_path: Path) -> None:
    readme = "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n---\n"
    make(tmp_path, {"README.md": readme, "a.jsonl": "", "b.jsonl": ""})
    assert texts(f"{tmp_path}:b") == texts(f"{tmp_path}:b@train") == ["b.jsonl"]
    with pytest.raises(UserError, match=r"has the configurations a, b; name one as .*:a"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match="has no configuration 'c'; known: a, b"):
        open_source(f"{tmp_path}:c")


@pytest.mark.parametrize("pattern", ["../secret.jsonl", "/etc/passwd.txt", "hf://datasets/a/b.jsonl"])
def test_a_readme_does_not_lead_out_of_its_folder(tmp_path: Path, pattern: str) -> None:
    make(
        tmp_path,
        {"secret.jsonl": "", "set/README.md": f"---\nconfigs:\n- config_name: a\n  data_files: '{pattern}'\n---"},
    )
    with pytest.raises(UserError, match="which is not in the folder"):
        open_source(str(tmp_path / "set"))


@pytest.mark.parametrize("readme", ["---\nconfigs: [\n---", "---\nconfigs: 3\n---", "---\nconfigs: [{a: 1}]\n---"])
def test_a_broken_readme_is_named(tmp_path: Path, readme: str) -> None:
    make(tmp_path, {"README.md": readme, "a.jsonl": ""})
    with pytest.raises(UserError, match=r"README\.md: "):
        open_source(str(tmp_path))


SLICES = [
    "train[:10%]",
    "train[10%:]",
    "train[3:7]",
    "train[-4:]",
    "train[:-15%]",
    "train[33%:66%]",
    "train[:2]+test[5:]",
    "train[-0:]",
    "train[-0%:]",
    "train[-1%:]",  # rounds to no row, and means all rows
    "train[:3]+train[:-0]+test[-0:2]",
]


@pytest.mark.parametrize("split", SLICES)
def test_slices_are_those_of_datasets(tmp_path: Path, split: str) -> None:
    rows = {name: [{"text": f"{name} {i}"} for i in range(count)] for name, count in (("train", 23), ("test", 7))}
    for name, some in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    assert texts(f"{tmp_path}@{split}") == datasets.load_dataset(str(tmp_path), split=split)["text"][:]
    if "+" not in split:
        assert texts(f"{tmp_path}/train.jsonl@{split}") == texts(f"{tmp_path}@{split}")


def test_what_is_no_split_is_said_and_not_called_a_missing_file(tmp_path: Path) -> None:
    make(tmp_path, {"train.jsonl": ""})
    for wrong in ("train[:10 %]", "train[", "train[:200%]", "+"):
        with pytest.raises(UserError, match="split"):
            open_source(f"{tmp_path}@{wrong}")
    with pytest.raises(UserError, match=r"nosuch\.jsonl: no such file or directory"):
        open_source(f"{tmp_path}/nosuch.jsonl@train[:10%]")


def test_bounds_never_count_where_no_total_is_needed() -> None:
    assert Part("train", "3", "7").bounds(lambda: 1 / 0) == (3, 7)


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    some = datasets.Dataset.from_list([{"text": str(i)} for i in range(5)])
    some.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": some, "test": some.select([3])}).save_to_disk(str(tmp_path / "two"))
    assert texts(str(tmp_path / "one")) == texts(str(tmp_path / "two")) == list("01234")
    assert texts(f"{tmp_path}/two@test") == ["3"]
    assert texts(f"{tmp_path}/one@train[1:3]") == ["1", "2"]
    (tmp_path / "one/state.json").write_text("{}")
    with pytest.raises(UserError, match="saved this folder, and cannot load it"):
        open_source(str(tmp_path / "one"))


def test_an_at_sign_in_a_path_is_part_of_it(tmp_path: Path) -> None:
    make(tmp_path, {"a@b/train.jsonl": "", "rows@train.jsonl": ""})
    assert texts(str(tmp_path / "a@b")) == ["a@b/train.jsonl"]
    assert texts(str(tmp_path / "rows@train.jsonl")) == ["rows@train.jsonl"]


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_compressed_files(tmp_path: Path, name: str, kind: str) -> None:
    plain = {
        "a.jsonl": '{"text": "é"}\n{"text": "b"}\n',
        "a.json": '[{"text": "é"}]',
        "a.csv": "text\né\n",
        "a.txt": "é\n",
    }
    (tmp_path / name).write_text(plain[name])
    expected = texts(str(tmp_path / name))
    path = tmp_path / f"{name}.{kind}"
    with pa.output_stream(str(path), compression={"gz": "gzip", "zst": "zstd"}[kind]) as file:
        file.write(plain[name].encode())
    assert texts(str(path)) == expected
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(UserError, match=rf"{name}\.{kind}: cannot be read"):
        texts(str(path))


def test_a_name_that_ends_in_gz_and_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read"):
        texts(str(tmp_path / "a.jsonl.gz"))
    with gzip.open(tmp_path / "b.parquet.gz", "wb") as file:
        shutil.copyfileobj((tmp_path / "a.jsonl.gz").open("rb"), file)
    with pytest.raises(UserError, match=r"files that end in \.gz are not read"):
        open_source(str(tmp_path / "b.parquet.gz"))


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\n{"text": "a"}\n{"text": "b"}\n')
    assert texts(str(tmp_path / "a.json")) == ["a", "b"]
