#!/usr/bin/env bash
# bitsandbytes: an NF4 block of zeros has the codes of zero (byte 0x77) and dequantises to zeros, with nested
# statistics too: a reader that divides by the block's scale must guard it.
# Seen: byte 0x77; zeros again.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2
cd "$folder"
env/bin/python - <<'END'
import bitsandbytes, torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

found = {}
for nested in (False, True):
    codes, state = quantize_4bit(torch.zeros(64), blocksize=64, quant_type="nf4", compress_statistics=nested)
    values = dequantize_4bit(codes, state)
    found[nested] = (sorted({hex(byte) for byte in codes.flatten().tolist()}), float(values.abs().max()))
print("bitsandbytes", bitsandbytes.__version__, "torch", torch.__version__)
print("nested statistics: (bytes, largest value):", found)
assert found == {False: (["0x77"], 0.0), True: (["0x77"], 0.0)}, "this has changed"
END
