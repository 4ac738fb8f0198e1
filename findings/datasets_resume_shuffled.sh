#!/usr/bin/env bash
# datasets: a shuffled IterableDataset that is resumed from its state_dict does not give the rows that the interrupted
# one would have given: what was in the shuffle buffer is lost.
# Seen: some rows come never.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0
cd "$folder"
env/bin/python - <<'END'
import datasets

def stream():
    rows = datasets.Dataset.from_dict({"x": list(range(100))}).to_iterable_dataset()
    return rows.shuffle(seed=0, buffer_size=20)

whole = [row["x"] for row in stream()]
first, seen = stream(), []
for row in first:
    seen.append(row["x"])
    if len(seen) == 40:
        state = first.state_dict()
        break
second = stream()
second.load_state_dict(state)
seen += [row["x"] for row in second]
lost, twice = sorted(set(whole) - set(seen)), sorted({x for x in seen if seen.count(x) > 1})
print("datasets", datasets.__version__)
print("rows lost:", len(lost), " rows twice:", len(twice), " same order:", seen == whole)
assert seen != whole and (lost or twice), "this has changed"
END
