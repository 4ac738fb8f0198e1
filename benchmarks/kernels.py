"""Time of a device by kernel name, from jax's profiler."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def time_of_kernels(run: Callable[[], Any], repetitions: int, most: int = 45) -> None:
    """Prints the kernels of `run` with milliseconds per repetition, slowest first."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        (path,) = Path(directory).rglob("*.xplane.pb")
        totals = totals_of(jax.profiler.ProfileData.from_file(str(path)))
    busy = sum(seconds for seconds, _ in totals.values())
    print(f"kernels: {1e3 * busy / repetitions:.1f} ms a repetition")
    for name, (seconds, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:most]:
        print(f"{1e3 * seconds / repetitions:9.2f} ms {count // repetitions:6d} x  {name}", flush=True)


def totals_of(profile: Any) -> dict[str, tuple[float, int]]:
    """Returns {kernel: (seconds, calls)} over all streams of the first device."""
    totals: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for plane in profile.planes:
        if not re.match(r"/device:(GPU|TPU):0", plane.name):
            continue
        for line in plane.lines:
            if not line.name.startswith(("Stream", "XLA Ops")):
                continue
            for event in line.events:
                statistics = dict(event.stats)
                name = f"{event.name[:70]} | {statistics.get('hlo_op', '')}"
                seconds, count = totals[name]
                totals[name] = (seconds + event.duration_ns / 1e9, count + 1)
    return totals
