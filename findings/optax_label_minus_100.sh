#!/usr/bin/env bash
# optax: a label of -100, which other libraries ignore, is counted from the end of the vocabulary: class 100 of 200,
# and nan where there are fewer than 100 classes.
# Seen: -100 costs what 100 costs with 200 classes, nan with 50.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2
cd "$folder"
env/bin/python - <<'END'
import jax, jax.numpy as jnp
import optax

logits = jax.random.normal(jax.random.key(0), (200,))
loss = optax.softmax_cross_entropy_with_integer_labels
ignored, hundredth = float(loss(logits, jnp.array(-100))), float(loss(logits, jnp.array(100)))
few = float(loss(logits[:50], jnp.array(-100)))
print("optax", optax.__version__, "jax", jax.__version__)
print("200 classes: label -100:", ignored, " label 100:", hundredth, "; 50 classes: label -100:", few)
assert ignored == hundredth and few != few, "this has changed"
END
