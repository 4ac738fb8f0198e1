"""Traffic between devices, parsed from the text of a compiled program."""

import math
import re

_ITEM = {"u8": 1, "s8": 1, "pred": 1, "u16": 2, "bf16": 2, "f16": 2, "u32": 4, "s32": 4, "f32": 4, "u64": 8, "s64": 8}
_KINDS = r"\b(all-gather|all-reduce|reduce-scatter|all-to-all)(-start)?\("


def collective_bytes(text: str, loop_trips: int) -> dict[str, int]:
    """Returns the bytes of all results of collectives on one device in one run, by kind.

    Each result counts once per trip of the loops around it. `loop_trips` is used for loops with an unknown trip count.
    """
    trips: dict[str, int] = {}
    inside: dict[str, str] = {}
    moved: dict[tuple[str, str], int] = {}
    name = "ENTRY"
    for line in text.splitlines():
        if line.endswith("{") and "->" in line:
            name = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
        if body := re.search(r"body=%([\w.-]+)", line):
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            trips[body[1]], inside[body[1]] = int(known[1]) if known else loop_trips, name
        for called in re.findall(r"(?:to_apply|calls|branch_computations)=\{?%([\w.-]+)", line):
            inside.setdefault(called, name)
        if kind := re.search(_KINDS, line):
            shapes = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", line.split(kind[0])[0])
            sizes = [math.prod(map(int, filter(None, dims.split(",")))) * _ITEM.get(dtype, 4) for dtype, dims in shapes]
            # A `-start` operation lists its operand next to its result.
            moved[name, kind[1]] = moved.get((name, kind[1]), 0) + (max(sizes) if kind[2] else sum(sizes))
    totals: dict[str, int] = {}
    for (at, kind), size in moved.items():
        while at in inside:
            size, at = size * trips.get(at, 1), inside[at]
        totals[kind] = totals.get(kind, 0) + size
    return totals
