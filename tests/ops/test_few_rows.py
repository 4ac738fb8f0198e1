"""Matmuls of few rows with the C++ function equal XLA's, for every format of the weight."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.ops import few_rows
from difflm_jax.ops.attention import attend_beside
from difflm_jax.ops.few_rows import InStack
from difflm_jax.quant.qtensor import QuantConfig, quantize
from difflm_jax.utils import native

WIDTH, OUTPUTS, LAYERS = 192, 99, 3  # outputs: not a multiple of a thread's share

needs_compiler = pytest.mark.skipif(not few_rows.is_available(), reason="no C++ compiler here")


def stack_of(name: str) -> object:
    w = jax.random.normal(jax.random.key(1), (LAYERS, OUTPUTS, WIDTH)) * 0.2
    if name in ("float32", "bfloat16"):
        return w.astype(name)
    name, block, *plain = name.split("-")
    config = QuantConfig(name, int(block), double_quant=not plain)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(quantize(layer, config) for layer in w))


STACKS = ("float32", "bfloat16", "nf4-64", "nf4-64-plain", "nf4-32", "int4-64", "int8-32")


@needs_compiler
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("name", STACKS)
def test_the_products_are_those_of_xla(name: str, dtype) -> None:
    w = InStack(stack_of(name), jnp.int32(2))
    x = jax.random.normal(jax.random.key(0), (13, WIDTH)).astype(dtype)
    own, expected = jax.jit(few_rows.product)(x, w), jax.jit(few_rows.reference)(x, w)
    np.testing.assert_allclose(own, expected, rtol=1e-6, atol=1e-6 * float(jnp.abs(expected).max()))
    assert own.dtype == jnp.float32


@needs_compiler
@pytest.mark.parametrize(("name", "dtype"), [("nf4-64", "float32"), ("int8-32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_a_row_does_not_depend_on_how_many_there_are(name: str, dtype: str) -> None:
    w = InStack(stack_of(name), jnp.int32(0))
    x = jax.random.normal(jax.random.key(0), (few_rows.MAX_ROWS, WIDTH)).astype(dtype)
    together = np.asarray(few_rows.product(x, w))
    for count in (1, 2, 3, 7, 8, 9, 15):
        np.testing.assert_array_equal(few_rows.product(x[:count], w), together[:count])


@needs_compiler
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("rank", (8, 16))
def test_a_low_rank_update_is_added_where_the_gate_is_open(dtype, rank: int) -> None:
    w = InStack(stack_of("nf4-64"), jnp.int32(1))
    keys = jax.random.split(jax.random.key(2), 3)
    down = jax.random.normal(keys[0], (LAYERS, rank, WIDTH)) * 0.1
    up = jax.random.normal(keys[1], (LAYERS, OUTPUTS, rank))
    x, gate = jax.random.normal(keys[2], (9, WIDTH)).astype(dtype), (jnp.arange(9) > 3)[:, None]
    updates = few_rows.Updates([(InStack(down, w.index), InStack(up, w.index)), None], gate, 2.0)
    own, bare = few_rows.products(x, [w, w], updates, jnp.float32)
    np.testing.assert_array_equal(own[:4], bare[:4])
    update = 2.0 * x[4:].astype(jnp.float32) @ down[1].T @ up[1].T
    tolerance = 0.02 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(own[4:] - bare[4:], update, atol=tolerance * float(jnp.abs(update).max()))


@needs_compiler
def test_attention_does_not_depend_on_which_keys_are_columns() -> None:
    """A token sees the same keys, as rows of its pass or as columns of a cache of any size: bit for bit the same."""
    keys = jax.random.split(jax.random.key(3), 3)
    q, k, v = (jax.random.normal(key, (1, 24, heads, 32)) for key, heads in zip(keys, (6, 2, 2), strict=True))

    def attended(known: int, room: int) -> np.ndarray:
        columns = [
            jnp.pad(jnp.swapaxes(x[:, :known], 1, 2), [(0, 0)] * 2 + [(0, room - known), (0, 0)])[None] for x in (k, v)
        ]
        step = jnp.arange(24 - known)
        is_known = jnp.broadcast_to(jnp.arange(room) < known, (1, len(step), room))
        mask = jnp.concatenate([is_known, (step <= step[:, None])[None]], axis=2)
        stacks = tuple(InStack(x, jnp.int32(0)) for x in columns)
        return np.asarray(few_rows.attend_beside(q[:, known:], stacks, (k[:, known:], v[:, known:]), mask))[:, -1]

    for known, room in ((16, 40), (5, 5), (22, 31)):
        np.testing.assert_array_equal(attended(known, room), attended(23, 29))


@needs_compiler
def test_inputs_that_end_within_a_vector_of_pairs_meet_no_neighbour() -> None:
    """In bfloat16 32 inputs are read at a time; of 208 the last vector has half of them."""
    w = jax.random.normal(jax.random.key(1), (2, OUTPUTS, 208)).astype(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (5, 208)).astype(jnp.bfloat16)
    own, expected = few_rows.product(x, InStack(w, jnp.int32(0))), few_rows.reference(x, InStack(w, jnp.int32(0)))
    np.testing.assert_allclose(own, expected, rtol=1e-6, atol=1e-6 * float(jnp.abs(expected).max()))


@needs_compiler
@pytest.mark.parametrize("softcap", (None, 3.0))
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_attention_beside_columns_is_that_of_xla(dtype, softcap: float | None) -> None:
    batch, rows, heads, kv_heads, columns, width = 3, 4, 6, 2, 37, 32
    key = iter(jax.random.split(jax.random.key(0), 6))
    shape = (LAYERS, batch, kv_heads, columns, width)
    stacks = [jax.random.normal(next(key), shape).astype(dtype) for _ in range(2)]
    own = tuple(jax.random.normal(next(key), (batch, rows, kv_heads, width)).astype(dtype) for _ in range(2))
    q = jax.random.normal(next(key), (batch, rows, heads, width)).astype(dtype)
    mask = jax.random.bernoulli(next(key), 0.6, (batch, rows, columns + rows)).at[1, 2].set(False)
    found = few_rows.attend_beside(q, tuple(InStack(x, jnp.int32(1)) for x in stacks), own, mask, softcap)
    wide = [x.astype(jnp.float32) for x in (q, *own, *(x[1] for x in stacks))]
    expected = attend_beside(wide[0], tuple(wide[3:]), tuple(wide[1:3]), mask, softcap)
    np.testing.assert_allclose(found, expected.astype(dtype), rtol=1e-2 if dtype == jnp.bfloat16 else 1e-6, atol=2e-6)
    assert not found[1, 2].any()


@needs_compiler
@pytest.mark.parametrize("part", ("q", "k", "v"))
def test_a_nan_in_attention_is_not_hidden(part: str) -> None:
    """Keys that are seen count even if their scores are NaN; those that are not seen never do."""
    shapes = {"q": (1, 2, 4, 32), "k": (1, 1, 2, 21, 32), "v": (1, 1, 2, 21, 32)}
    arrays = {name: jax.random.normal(jax.random.key(0), shape) for name, shape in shapes.items()}
    own = (jnp.ones((1, 2, 2, 32)),) * 2
    mask = jnp.ones((1, 2, 23), bool).at[0, 0, 3].set(False)

    def attended(at: tuple[int, ...]) -> np.ndarray:
        q, k, v = (x.at[at].set(jnp.nan) if name == part else x for name, x in arrays.items())
        found = few_rows.attend_beside(q, tuple(InStack(x, jnp.int32(0)) for x in (k, v)), own, mask)
        return np.isfinite(found)

    seen = attended((0, 0, 0, 0) if part == "q" else (0, 0, 0, 5, 0))
    assert not seen[0, 0, 0].all()
    assert seen[0, 0, 2:].all()  # heads of the other key
    if part != "q":
        unseen = attended((0, 0, 0, 3, 0))
        assert unseen[0, 0].all()
        assert not unseen[0, 1, 0].all()


@needs_compiler
def test_a_layer_is_read_in_place() -> None:
    """The compiled loop copies no weights from their stack."""
    stack = jnp.zeros((LAYERS, WIDTH, WIDTH))

    def loop(x: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, i: (few_rows.product(x, InStack(stack, i)), None), x, jnp.arange(LAYERS))[0]

    memory = jax.jit(loop).lower(jnp.zeros((1, WIDTH)), stack).compile().memory_analysis()
    assert memory.temp_size_in_bytes < stack[0].nbytes / 4


def test_weights_that_the_function_does_not_read_are_left_to_xla() -> None:
    assert few_rows.suits(jnp.zeros((2, 128, 128)), 1)
    assert not few_rows.suits(jnp.zeros((2, 128, 120)), 1)  # not whole vectors
    assert not few_rows.suits(jnp.zeros((2, 4, 128, 128)), 1)  # experts
    assert not few_rows.suits(jnp.zeros((2, 32, 32)), 1)  # too small to be worth a call
    assert not few_rows.suits(jnp.zeros((2, 128, 128), jnp.float16), 1)
    assert not few_rows.suits(jnp.zeros((2, 128, 128)), few_rows.MAX_DENSE_ROWS + 1)
    assert not few_rows.suits(jax.vmap(lambda w: quantize(w, QuantConfig("nf4", 16)))(jnp.zeros((2, 128, 128))), 1)


def test_the_environment_turns_it_off(monkeypatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    native.has_native.cache_clear()
    assert not few_rows.is_available()
    native.has_native.cache_clear()


def test_a_build_that_fails_is_announced_once(monkeypatch, tmp_path, capsys) -> None:
    source = tmp_path / "wrong.cc"
    source.write_text("this is not C++\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "COMPILERS", ("false", "g++"))
    assert not native.has_native(source, ("nothing",))
    assert not native.has_native(source, ("nothing",))
    assert capsys.readouterr().err.count("wrong.cc was not built") == 1
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.skipif(os.name != "posix", reason="nothing is built there")
def test_a_compiler_that_talks_and_never_ends_is_announced(monkeypatch, tmp_path, capsys) -> None:
    compiler = tmp_path / "slow"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho error: waits for a licence >&2\nexec sleep 60\n')
    compiler.chmod(0o700)
    source = tmp_path / "some.cc"
    source.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "COMPILERS", (str(compiler),))
    monkeypatch.setattr(native, "SECONDS", 0.5)
    assert not native.has_native(source, ("nothing",))
    assert "some.cc was not built, XLA computes instead (error: waits for a licence)" in capsys.readouterr().err


@needs_compiler
def test_it_is_built_once_and_kept_for_the_owner_alone(tmp_path) -> None:
    code = "from difflm_jax.ops import few_rows; print(few_rows.is_available())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True) for _ in range(2)
    ]
    assert [run.stdout.strip() for run in runs] == ["True", "True"]
    for name in ("few_rows.cc", "beside.cc"):
        assert [run.stderr.count(f"building {name}") for run in runs] == [1, 0]
    assert len(libraries := list(tmp_path.rglob("*.so"))) == 2
    assert {library.parent.stat().st_mode & 0o777 for library in libraries} == {0o700}
