"""Settings as fields of dataclasses: a component defines each setting once.

A field declared with `setting` becomes a key of the config, with its default, type, check, line of `--help` and row of
docs/configuration.md (`difflm_jax.config.schema`).
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

from difflm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """A range of allowed numbers: a predicate, and its description."""

    wording: str
    holds: Callable[[float], bool]


POSITIVE = Range("greater than 0", lambda x: x > 0)
NOT_NEGATIVE = Range("0 or more", lambda x: x >= 0)
TWO_OR_MORE = Range("2 or more", lambda x: x >= 2)
SHARE = Range("in [0, 1]", lambda x: 0 <= x <= 1)
PROPER_SHARE = Range("in [0, 1)", lambda x: 0 <= x < 1)
RATE = Range("in (0, 1]", lambda x: 0 < x <= 1)
SEED = Range("in [0, 2^31)", lambda x: 0 <= x < 2**31)
DEVICES = Range("-1 (all devices) or greater than 0", lambda x: x == -1 or x > 0)


@dataclasses.dataclass(frozen=True)
class Setting:
    """The description of a setting, apart from its name and type.

    choices: the allowed values, or those of each element of a list. within: the allowed range. required: not empty.
    path: `~` is expanded. key: the name in the config, if it differs from the field's. config_default: the default in
    the config, if it differs from the component's own.
    """

    help: str
    choices: tuple[Any, ...] = ()
    within: Range | None = None
    required: bool = False
    path: bool = False
    key: str = ""
    config_default: Any = None

    def check(self, name: str, value: Any) -> None:
        """Raises a `UserError` that begins with `name` if `value` is not allowed."""
        if self.required and not value:
            known = f" (known: {', '.join(self.choices)})" if self.choices else ""
            raise UserError(f"{name} must not be empty{known}")
        if isinstance(value, tuple):
            self._check_list(name, value)
        elif self.choices and value not in self.choices:
            raise UserError(f"{name} must be {' or '.join(map(repr, self.choices))}, not {value!r}")
        elif self.within and not (math.isfinite(value) and self.within.holds(value)):
            raise UserError(f"{name} must be {self.within.wording}, not {value!r}")

    def _check_list(self, name: str, values: tuple[Any, ...]) -> None:
        if self.choices and (unknown := [value for value in values if value not in self.choices]):
            raise UserError(f"{name}: {unknown[0]!r} is not known (known: {', '.join(self.choices)})")
        if self.choices and len(set(values)) != len(values):
            raise UserError(f"{name} names something twice: {', '.join(values)}")
        if self.within and not all(map(self.within.holds, values)):
            raise UserError(f"{name} must be numbers {self.within.wording}, not {values}")


def setting(
    default: Any = dataclasses.MISSING, help: str = "", *, choices: Collection[Any] = (), **details: Any
) -> Any:  # a dataclass field; `Any`: a type checker accepts it as a value of the field's type
    """Returns a dataclass field that is a setting. `details` are the other fields of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, tuple(choices), **details)})
