"""Assigns the files of a folder to splits, and parses which part of a split a name asks for.

A clone of a hub data set gives the same rows as `load_dataset(folder, split=...)`. The first of these rules that
matches applies: the `configs` of the README's YAML; files `data/SPLIT-00000-of-00002.*`; the words train, validation
and test (and their synonyms) in folder names; the same in file names; every file belongs to the split train.
Source: https://huggingface.co/docs/hub/datasets-file-names-and-splits, and `datasets/data_files.py` (5.2).
"""

import dataclasses
import glob
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from difflm_jax.data.readers import ending
from difflm_jax.errors import UserError, one_line

Files = dict[str, list[Path]]  # split to paths relative to the folder

# Files that describe a data set and hold no rows.
METADATA_FILES = {
    "README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
}  # fmt: skip

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATOR = "[-._ 0-9]"
_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_PART = re.compile(r"(?P<split>[\w.-]+)(\[(?P<first>-?\d+%?)?:(?P<last>-?\d+%?)?\])?")


@dataclasses.dataclass(frozen=True)
class Part:
    """A split or a slice of it: `first` and `last` are None, an index ('10', '-5') or a percentage ('10%')."""

    split: str
    first: str | None = None
    last: str | None = None

    def bounds(self, count: Callable[[], int]) -> tuple[int, int | None]:
        """Returns the slice's indices, rounded as in `datasets`. `count()` counts the split's rows, only if needed."""
        first, last = (self._index(bound, count) for bound in (self.first, self.last))
        return first or 0, last

    @staticmethod
    def _index(bound: str | None, count: Callable[[], int]) -> int | None:
        if bound is None:
            return None
        if bound.endswith("%"):
            total, share = count(), int(bound[:-1])
            at = round(share * total / 100.0)
        elif not bound.startswith("-"):
            return int(bound)
        else:
            total, at = count(), int(bound)
        return min(max(at + total if at < 0 else at, 0), total)  # -0 is 0, as in `datasets`


def parse_splits(text: str, where: str) -> list[Part]:
    """Parses a split such as 'train', 'train[:10%]' or 'train+test'. Raises `UserError`."""
    parts = [_PART.fullmatch(part.strip()) for part in text.split("+")]
    if not all(parts):
        raise UserError(f"{where}: cannot read the split {text!r}; write train, train[:10%], train[100:200] or a+b")
    for part in parts:
        for bound in (part["first"], part["last"]):
            if bound and bound.endswith("%") and abs(int(bound[:-1])) > 100:
                raise UserError(f"{where}: {bound} in the split {text!r} is no share of the rows")
    return [Part(part["split"], part["first"], part["last"]) for part in parts]


def files_by_split(name: str, folder: Path, config: str | None = None) -> Files:
    """Returns the data files of `folder` by split. Raises `UserError`, with a message that begins with `name`."""
    known = _configs(name, folder)
    if known:
        chosen = known[_choose(name, known, config)]
        base = PurePosixPath(chosen["data_dir"]) if chosen.get("data_dir") else PurePosixPath(".")
        if chosen.get("data_files") is not None:
            return _matching(name, folder, chosen["data_files"])
        return by_file_names(path for path in data_files(folder) if PurePosixPath(path).is_relative_to(base))
    if config is not None:
        raise UserError(f"{name}: the folder names no configurations, so {config!r} is none of them")
    return by_file_names(data_files(folder))


def data_files(folder: Path) -> list[Path]:
    """Returns the sorted files at any depth that hold rows. Hidden, `__*` and metadata files are skipped."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if ending(path) is not None and path.is_file())
    return sorted(path for path in found if not _is_ignored(path))


def by_file_names(files: Iterable[Path]) -> Files:
    """Assigns splits by the first rule that finds one. A file may belong to two splits, as in `datasets`."""
    files = list(files)
    shards: Files = {}
    for path in files:
        if path.parent == Path("data") and (shard := _SHARD.fullmatch(path.name)):
            shards.setdefault(shard["split"], []).append(path)
    if shards:
        return {split: shards[split] for split in sorted(shards, key=lambda s: (s not in _KEYWORDS, s))}
    for matches in (_in_folder_name, _in_file_name):
        found = {
            split: [path for path in files if any(matches(path, word) for word in words)]
            for split, words in _KEYWORDS.items()
        }
        if any(found.values()):
            return {split: paths for split, paths in found.items() if paths}
    return {"train": files} if files else {}


def _in_folder_name(path: Path, word: str) -> bool:
    pattern = re.compile(rf"(.*{_SEPARATOR})?{word}({_SEPARATOR}.*)?")
    return any(pattern.fullmatch(part) for part in path.parts[:-1])


def _in_file_name(path: Path, word: str) -> bool:
    return re.fullmatch(rf"(.*{_SEPARATOR})?{word}{_SEPARATOR}.*", path.name) is not None


def _is_ignored(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or any(part.startswith("__") for part in path.parts[:-1]) or path.name in METADATA_FILES


def _configs(name: str, folder: Path) -> dict[str, Mapping[str, Any]]:
    """The `configs` of the YAML in README.md, by name."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    text = readme.read_text("utf-8", errors="replace")
    front = re.match(r"\ufeff?---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text.replace("\r\n", "\n"), re.DOTALL)
    if front is None:
        return {}
    try:
        values = yaml.safe_load(front[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name}/README.md: its YAML cannot be read ({one_line(error)[:200]})") from error
    configs = values.get("configs") if isinstance(values, Mapping) else None
    if not configs:
        return {}
    if not isinstance(configs, list) or not all(
        isinstance(config, Mapping) and isinstance(config.get("config_name"), str) for config in configs
    ):
        raise UserError(f"{name}/README.md: configs is not a list of objects with a config_name")
    return {config["config_name"]: config for config in configs}


def _choose(name: str, configs: Mapping[str, Mapping[str, Any]], wanted: str | None) -> str:
    if wanted is not None and wanted not in configs:
        raise UserError(f"{name}: has no configuration {wanted!r}; known: {', '.join(configs)}")
    defaults = [key for key, config in configs.items() if key == "default" or config.get("default")]
    chosen = wanted or (next(iter(configs)) if len(configs) == 1 else defaults[0] if defaults else None)
    if chosen is None:
        raise UserError(
            f"{name}: has the configurations {', '.join(configs)}; name one as {name}:{next(iter(configs))}"
        )
    return chosen


def _matching(name: str, folder: Path, entries: Any) -> Files:
    """Resolves the YAML's `data_files`: a pattern, a list of patterns, or a list of {split, path}."""
    entries = entries if isinstance(entries, list) else [entries]
    if not all(isinstance(entry, Mapping) for entry in entries):
        entries = [{"split": "train", "path": entries}]
    found: Files = {}
    for entry in entries:
        patterns = entry.get("path")
        patterns = patterns if isinstance(patterns, list) else [patterns]
        if not isinstance(entry.get("split"), str) or not all(isinstance(pattern, str) for pattern in patterns):
            raise UserError(f"{name}/README.md: an entry of data_files is not {{split, path}}")
        matched = (path for pattern in patterns for path in _matches(name, folder, pattern))
        found.setdefault(entry["split"], []).extend(dict.fromkeys(matched))
    return found


def _matches(name: str, folder: Path, pattern: str) -> Iterator[Path]:
    if "://" in pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise UserError(f"{name}/README.md: data_files names {pattern!r}, which is not in the folder")
    for text in sorted(glob.glob(pattern, root_dir=folder, recursive=True)):  # noqa: PTH207 (pathlib's ** differs)
        path = Path(text)
        if (folder / path).is_file() and ending(path) is not None and not _is_ignored(path):
            yield path
