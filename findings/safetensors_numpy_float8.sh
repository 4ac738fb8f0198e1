#!/usr/bin/env bash
# safetensors: its numpy interface writes float8 arrays and cannot read them back.
# Seen: save works, load raises.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
env/bin/python - <<'END'
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import load, save

written = save({"x": np.ones(4, ml_dtypes.float8_e4m3fn)})
try:
    raised = f"nothing: {load(written)}"
except Exception as error:
    raised = f"{type(error).__name__}: {error}"
print("safetensors", safetensors.__version__, "ml_dtypes", ml_dtypes.__version__)
print("written", len(written), "bytes; reading raises", raised)
assert not raised.startswith("nothing"), "this has changed"
END
