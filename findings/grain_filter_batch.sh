#!/usr/bin/env bash
# grain: MapDataset.filter keeps its length and gives None for rows that are left out, so that batch() over it raises,
# and an index past the end wraps around.
# Seen: len 10 of 5 rows; batch raises; index 10 gives row 0 again.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check grain==0.2.18
cd "$folder"
env/bin/python - <<'END'
import importlib.metadata
import grain

rows = grain.MapDataset.range(10).filter(lambda x: x % 2 == 0)
print("grain", importlib.metadata.version("grain"))
print("len:", len(rows), " rows[1]:", rows[1], " rows[10]:", rows[10])
try:
    print("batch:", rows.batch(2)[0])
    raised = ""
except Exception as error:
    raised = type(error).__name__
print("batch raises:", raised or "nothing")
assert len(rows) == 10 and rows[1] is None and rows[10] == 0 and raised, "this has changed"
END
