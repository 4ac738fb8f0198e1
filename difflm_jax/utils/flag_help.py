"""`--help` of a command, in groups with defaults, and the likely correction of a misspelled flag."""

import difflib
import textwrap
from collections.abc import Iterable, Mapping

from absl import flags

_WIDTH = 110


def help_text(usage: str, flag_values: flags.FlagValues, titles: Mapping[str, str]) -> str:
    """Returns `usage`, then every flag under the title of its group, with its default and allowed values.

    titles: the name of a flag -> the title of its group. Other flags belong to the command itself and come first.
    The groups follow in the order of their first flag.
    """
    groups: dict[str, list[flags.Flag]] = {"Flags": []}
    defined = [flag for module in flag_values.flags_by_module_dict().values() for flag in module]
    for flag in {flag.name: flag for flag in defined}.values():
        groups.setdefault(titles.get(flag.name, "Flags"), []).append(flag)
    sections = [f"{title}:\n" + "\n".join(map(_line, members)) for title, members in groups.items() if members]
    return "\n\n".join([usage.strip(), *sections])


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the known name most similar to `name`, compared as a whole or by its last part."""

    def likeness(candidate: str) -> float:
        last = difflib.SequenceMatcher(None, candidate.split(".")[-1], name).ratio()
        return max(difflib.SequenceMatcher(None, candidate, name).ratio(), last)

    return max(known, key=likeness)


def _line(flag: flags.Flag) -> str:
    """Returns the help of one flag: its name and default, then its description."""
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}={_shown(flag)}"
    text = " ".join((flag.help or "").split())
    if (choices := getattr(flag.parser, "enum_values", None)) and flag.default is None:
        name, text = f"--{flag.name}={'|'.join(choices)}", text.partition(">: ")[2]
    if flag.boolean and flag.default:
        text += " On by default."
    return f"  {name}\n{textwrap.fill(text, _WIDTH, initial_indent=' ' * 6, subsequent_indent=' ' * 6)}"


def _shown(flag: flags.Flag) -> str:
    """Returns the default of a flag, or the kind of value that it takes."""
    if flag.default in (None, "", []):
        return {"int": "INTEGER", "float": "NUMBER"}.get(flag.flag_type(), "...")
    return ",".join(flag.default) if isinstance(flag.default, list) else str(flag.default)
