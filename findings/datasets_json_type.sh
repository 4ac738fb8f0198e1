#!/usr/bin/env bash
# datasets: load_dataset('json') gives a column the type Json as soon as rows differ in shape (one optional key is
# enough), and to_parquet then stores JSON text, which every other reader of the file gets with its quotes.
# Seen: pyarrow reads the content as '"b"', quotes included, or the whole message as text.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0
cd "$folder"
env/bin/python - <<'END'
import json
import datasets
import pyarrow.parquet

rows = [
    {"messages": [{"role": "user", "content": "a"}]},
    {"messages": [{"role": "user", "content": "b", "name": "n"}, {"role": "tool", "content": [{"type": "text"}]}]},
]
with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
found = datasets.load_dataset("json", data_files="rows.jsonl", split="train", cache_dir="cache")
found.to_parquet("rows.parquet")
message = pyarrow.parquet.read_table("rows.parquet").to_pylist()[1]["messages"][0]
print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
print("feature:", found.features["messages"])
print("as datasets reads it:", found[1]["messages"][0], " as pyarrow reads it:", repr(message))
content = message["content"] if isinstance(message, dict) else message
assert "Json" in str(found.features) and isinstance(content, str) and content != "b", "this has changed"
END
