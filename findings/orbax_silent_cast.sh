#!/usr/bin/env bash
# orbax: a restore into another dtype than was saved casts without a word, also where that loses the value.
# Seen: 2.7, 300 and nan become 2, 44 and 0 in int8.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.10.2
cd "$folder"
env/bin/python - <<'END'
import importlib.metadata, pathlib, warnings
import jax, numpy as np
import orbax.checkpoint as ocp

warnings.simplefilter("error")
path = pathlib.Path("saved").absolute()
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, {"x": np.array([2.7, 300.0, np.nan], np.float32)})
    checkpointer.wait_until_finished()
    target = {"x": jax.ShapeDtypeStruct((3,), np.int8, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    restored = np.asarray(checkpointer.restore(path, target)["x"])
print("orbax-checkpoint", importlib.metadata.version("orbax-checkpoint"), "jax", jax.__version__)
print("saved [2.7, 300, nan] as float32, restored as int8:", restored.tolist())
assert restored.tolist()[:2] == [2, 44], "this has changed"
END
