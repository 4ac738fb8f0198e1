#!/usr/bin/env bash
# orbax: int4 arrays are saved, uint4 arrays are not.
# Seen: int4 is saved and restored; uint4 raises.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.10.2
cd "$folder"
env/bin/python - <<'END'
import importlib.metadata, pathlib
import jax, jax.numpy as jnp
import orbax.checkpoint as ocp

found = {}
for dtype in ("int4", "uint4"):
    path = pathlib.Path(dtype).absolute()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            value = {"x": jnp.arange(8).astype(dtype)}
            checkpointer.save(path, value)
            checkpointer.wait_until_finished()
            found[dtype] = bool((checkpointer.restore(path, value)["x"].astype(int) == value["x"].astype(int)).all())
    except Exception as error:
        found[dtype] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
print("orbax-checkpoint", importlib.metadata.version("orbax-checkpoint"), "jax", jax.__version__)
print(found)
assert found["int4"] is True and found["uint4"] is not True, "this has changed"
END
