#!/usr/bin/env bash
# safetensors: its numpy interface writes an array that lies in Fortran order (a transposed view) with the bytes of
# its memory: right shape, wrong values, no error.
# Seen: [[0, 1, 2], [3, 4, 5]] in Fortran order comes back as other values.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$folder"
env/bin/python - <<'END'
import numpy as np
import safetensors
from safetensors.numpy import load, save

array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
again = load(save({"x": array}))["x"]
print("safetensors", safetensors.__version__, "numpy", np.__version__)
print("written:", array.tolist(), " read:", again.tolist())
assert again.shape == array.shape and not np.array_equal(again, array), "this has changed"
END
