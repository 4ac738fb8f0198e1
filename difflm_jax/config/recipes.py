"""Recipes are the config files of the repository: list them, show one, copy one, or start a directory from one.

difflm recipes list | show NAME | copy NAME FILE.py
difflm init DIR --data=FILE [--model=DIR_OR_HUB_ID] [--recipe=small_data]
"""

import ast
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from difflm_jax.config.files import load_config
from difflm_jax.errors import UserError, one_line
from difflm_jax.utils.files import check_new_directory, write_whole
from difflm_jax.utils.flag_help import help_text, nearest

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
_HELP = ("--help", "-h", "-help")

FLAGS = flags.FlagValues()
flags.DEFINE_string("data", "", "Rows to train on: a file, a directory or a hub id.", flag_values=FLAGS)
flags.DEFINE_string(
    "model", "", "Hugging Face directory, hub id or .gguf file; default: the recipe's.", flag_values=FLAGS
)
flags.DEFINE_string("recipe", "small_data", "The recipe to begin with (difflm recipes list).", flag_values=FLAGS)


def recipes(argv: Sequence[str]) -> int:
    """`difflm recipes ...`: prints what was asked for, or writes a copy. Raises `UserError`."""
    match list(argv[1:]):
        case ["list"]:
            for path in _all():
                print(f"{path.stem:<22}{_title(path)}")
        case ["show", name]:
            print(_find(name).read_text(encoding="utf-8"), end="")
        case ["copy", name, target]:
            _copy(_find(name), Path(target).expanduser())
        case words if not words or words[0] in _HELP:
            print(__doc__.strip())
        case _:
            raise UserError("write difflm recipes list, difflm recipes show NAME or difflm recipes copy NAME FILE.py")
    return 0


def init(argv: Sequence[str]) -> Path | None:
    """`difflm init DIR ...`: writes DIR/config.py, reads it back and returns its path; with --help returns None.

    Raises `UserError`, before anything is written, for invalid flags, an unknown recipe or a directory that cannot be
    used. The data are not read.
    """
    if any(word in _HELP for word in argv[1:]):
        print(help_text(__doc__, FLAGS, {}))
        return None
    values = flags.FlagValues()
    values.append_flag_values(FLAGS)
    for name in FLAGS:
        values[name].unparse()
    try:
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(one_line(error)) from error
    if len(rest) != 1 or not values.data:
        raise UserError("name a new directory and the rows: difflm init DIR --data=mine.jsonl")
    directory = Path(rest[0]).expanduser()
    check_new_directory(directory)
    recipe = _find(values.recipe)
    text = _with_keys(
        recipe,
        {
            "model": _anywhere(values.model or load_config(str(recipe)).model),
            "dataset": _anywhere(values.data),
            "output_dir": str(directory.absolute() / "run"),
        },
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.py"
    write_whole(path, text)
    load_config(str(path))
    print(f"wrote {path}")
    return path


def _anywhere(name: str) -> str:
    """Returns the absolute path of `name` if it exists here or in the repository, else `name` unchanged."""
    for path in (Path(name).expanduser(), CONFIGS.parent / name):
        if path.exists():
            return str(path.absolute())
    return name


def _with_keys(path: Path, keys: dict[str, str]) -> str:
    """Returns the text of the recipe at `path`, changed so that its `get_config` sets `keys` last."""
    before, found, after = path.read_text(encoding="utf-8").rpartition("    return config\n")
    if not found:
        raise UserError(f"{path}: does not end in `return config`, so nothing can be set in a copy")
    lines = "".join(f"    config.{key} = {value!r}\n" for key, value in keys.items())
    return f"{before}\n    # Set by difflm init.\n{lines}{found}{after}"


def _copy(recipe: Path, target: Path) -> None:
    if target.exists():
        raise UserError(f"{target}: exists; name a new file")
    if target.suffix != ".py":
        raise UserError(f"{target}: name a file that ends in .py")
    write_whole(target, recipe.read_text(encoding="utf-8"))
    print(f"wrote {target}\nnext: difflm train --config={target} --config.dataset=FILE --preview")


def _all() -> list[Path]:
    found = sorted(CONFIGS.glob("*.py"))
    if not found:
        raise UserError(f"{CONFIGS}: no recipes there; they are the files of configs/ in the repository")
    return found


def _find(name: str) -> Path:
    known = {path.stem: path for path in _all()}
    if name.removesuffix(".py") not in known:
        raise UserError(f"{name}: no such recipe (did you mean {nearest(name, known)}? difflm recipes list)")
    return known[name.removesuffix(".py")]


def _title(path: Path) -> str:
    """Returns the first line of a recipe's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
