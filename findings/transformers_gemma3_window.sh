#!/usr/bin/env bash
# transformers: Gemma3TextConfig with use_bidirectional_attention=True halves sliding_window in memory each time it is
# made; saving doubles it again, but an odd window loses one at each save.
# Seen: 8 becomes 5 in memory and 8 in the file; 9 becomes 8 in the file.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cd "$folder"
env/bin/python - <<'END'
import json
import transformers
from transformers import Gemma3TextConfig

found = {}
for window in (8, 9):
    config = Gemma3TextConfig(sliding_window=window, use_bidirectional_attention=True)
    config.save_pretrained(f"window{window}")
    with open(f"window{window}/config.json") as file:
        found[window] = (config.sliding_window, json.load(file)["sliding_window"])
print("transformers", transformers.__version__)
print("asked for: (in memory, in the file):", found)
assert found == {8: (5, 8), 9: (5, 8)}, "this has changed"
END
