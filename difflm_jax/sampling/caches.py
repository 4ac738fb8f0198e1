"""Models as the sampler sees them, and the caches of keys and values that shorten its passes.

A cache stores the keys and values of every column of the canvas. A pass runs over a window of columns and replaces
their cached keys; the other columns are only read:

  prompt  exact under `prefix` and `causal` attention: the prompt runs once, and a pass runs the whole answer
  blocks  exact under attention in blocks and `causal` attention: the prompt runs once, and a pass runs the active block
          of each row. A finished block runs once more to make its keys final. It runs with the next block if all rows
          enter one or passes are short; otherwise alone, while other rows fill theirs
  prefix  Fast-dLLM (arXiv:2505.22618): the canvas runs at the start of a block; other passes run the block and all
          later columns, with the cached keys of earlier columns
  dual    Fast-dLLM: the same, but other passes run only the active block

`prefix` and `dual` are approximations, for attention under which the keys of a finished token still change.
`refresh_interval` recomputes them after that many passes of a block. A row whose canvas is due waits until it is due
for all rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from difflm_jax.diffusion.config import DiffusionConfig, Layout, columns_from
from difflm_jax.distributed.collectives import everywhere, varying_with
from difflm_jax.distributed.sharding import over_rows
from difflm_jax.models.attention import Window, positions_of
from difflm_jax.models.stacks import in_stacks, stay_in_stacks
from difflm_jax.models.transformer import Transformer, head_logits
from difflm_jax.sampling.loop import Canvas, Carry, Loop, Plan, Predict, Turn
from difflm_jax.sampling.options import Sampling

Variables = dict[str, Any]  # {"params": ..., "lora": ...}


@struct.dataclass
class Cache:
    """Keys and values of every column, and their state in each row."""

    columns: Any  # the transformer's `cache` collection: [N, B, S, K, E] each
    state: jax.Array  # [B] int32; blocks: number of final blocks; dual: 1 if the prefilled canvas is still current


FirstCache = Callable[[], Cache | None]


@struct.dataclass
class Decoder:
    """A model for decoding: a pytree whose leaves are `variables`; the other fields are static to `jax.jit`."""

    variables: Variables
    model: Transformer = struct.field(pytree_node=False)
    diffusion: DiffusionConfig = struct.field(pytree_node=False)
    eos_token_ids: tuple[int, ...] = struct.field(pytree_node=False, default=())
    pad_token_id: int = struct.field(pytree_node=False, default=0)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)  # `variables` and rows are sharded over it

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D]."""
        params, lora = self.variables["params"], self.variables.get("lora")
        in_place = self.reads_in_place(hidden, hidden.size // hidden.shape[-1])
        return head_logits(self.model.config, params, lora, self.model.mask_token_id, hidden, in_place)

    def reads_in_place(self, x: jax.Array, rows: int) -> bool:
        """Whether a pass over `rows` tokens with activations like `x` reads the weights in their stacks."""
        return self.mesh is None and stay_in_stacks(self.model, x, rows)


def fill(decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling) -> Carry:
    """Fills a canvas and returns the last carry (`Carry.slim`). `fill_on` compiles this function."""

    def rows(variables: Variables, canvas: Canvas) -> Carry:
        loop, first_cache = loop_over(decoder.replace(variables=variables), plan, canvas, sampling)
        return loop.run(loop.start(first_cache())).slim()

    return over_rows(rows, decoder.mesh, decoder.variables, canvas)


# A pass over few tokens takes as long as reading the weights. XLA's own GEMMs first copy the weights of a layer out of
# their stack, and the dot merger concatenates the weights of matmuls that share an input. cuBLAS reads them in place.
# Qwen3-4B in blocks of 32 on an H200, per pass: 7.4 ms instead of 9.1 at batch 1, 10.6 instead of 15.1 at batch 8
# (measured with the dot merger still on).
_ON_GPU = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


def fill_on(platform: str) -> Callable[..., Carry]:
    """Returns `fill`, compiled for devices of jax's `platform`.

    It compiles once for each shape of canvas, plan and set of enabled options. The number of passes is data.
    """
    return compiled_on(platform, fill)


def compiled_on(platform: str, function: Callable[..., Any], donated: str | None = None) -> Callable[..., Any]:
    """Returns a jitted `function`, static in its `plan`, with the compiler options for jax's `platform`."""
    return _compiled(platform in ("gpu", "cuda"), function, donated)


@functools.cache
def _compiled(on_gpu: bool, function: Callable[..., Any], donated: str | None) -> Callable[..., Any]:
    options = _ON_GPU if on_gpu else None
    return jax.jit(function, static_argnames="plan", donate_argnames=donated, compiler_options=options)


def loop_over(decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling) -> tuple[Loop, FirstCache]:
    """Returns the sampler's loop over a model, and a function that builds its first cache."""
    predict, first_cache = make_predict(decoder, plan, canvas, sampling)
    loop = Loop(predict, canvas, plan, sampling, decoder.diffusion.mask_token_id, decoder.eos_token_ids)
    return loop, first_cache


def cache_kind(diffusion: DiffusionConfig, cache: str) -> str:
    """Resolves `cache` under an attention rule: "none", "prompt", "blocks", "prefix" or "dual". "auto" is exact."""
    return diffusion.exact_cache if cache == "auto" else cache


# (columns, tokens, first column of each row's block) -> (logits of the blocks, columns)
Forward = Callable[..., tuple[jax.Array, Any]]


def make_predict(decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling) -> tuple[Predict, FirstCache]:
    """Returns `predict` and a function that builds its first cache, by the kind of cache (see the module docstring)."""
    diffusion = decoder.diffusion
    kind = cache_kind(diffusion, sampling.cache)
    columns, shift = canvas.tokens.shape[1], diffusion.shift  # windows begin `shift` columns earlier
    answer = plan.first_column - shift
    known = answer if kind != "none" and diffusion.exact_cache != "none" else 0  # columns that never run again
    runner = _Runner(decoder, plan.block_length, canvas, sampling.cfg_scale)
    one_pass_a_block = plan.steps_per_block == 1 and sampling.edit_threshold is None

    def first_cache(columns: int, state: int) -> Cache:
        zeros_B = varying_with(jnp.zeros(len(canvas.tokens), jnp.int32), canvas.tokens)
        return Cache(runner.prefilled(columns), zeros_B + state)

    # Each pass: (first column of the block) -> (first column, number of columns, first column to write)
    whole = runner.run(lambda first: (known, columns - known, known), keep=kind in ("prefix", "dual"))
    if kind in ("none", "prompt"):

        def predict(cache: Cache | None, tokens_BL: jax.Array, turn: Turn) -> tuple[jax.Array, Any, None]:
            return whole(cache and cache.columns, tokens_BL, turn.first)[0], cache, None

        return predict, lambda: None if kind == "none" else first_cache(known, 0)
    if kind == "blocks":
        predict = _by_blocks(runner, plan, shift, one_pass_a_block)
        return predict, lambda: first_cache(plan.first_column, 0)
    if kind == "prefix":
        later = runner.run(lambda first: (answer, columns - answer, first), keep=False)
        return _by_canvases(whole, later, sampling, one_pass_a_block), lambda: first_cache(0, 0)
    later = runner.run(lambda first: (first - shift, plan.block_length + shift, first), keep=False)
    begun = (0, 0) if one_pass_a_block else (columns, 1)
    return _by_canvases(whole, later, sampling, one_pass_a_block), lambda: first_cache(*begun)


# A pass over fewer tokens takes about as long as reading the weights, so doubling the window costs less than a second
# pass. SmolLM2-135M, bfloat16, 2 cores of an EPYC: 64 tokens 0.12 s, 256 tokens 0.20 s. An H200 multiplies 206 tokens
# by a bfloat16 weight in the time that it takes to read it.
TOKENS_OF_ONE_READ = 256


def _by_blocks(runner: "_Runner", plan: Plan, shift: int, one_pass_a_block: bool) -> Predict:
    """Returns `predict` of "blocks". A row whose last block is not final runs that first, or with its active block."""
    block = plan.block_length

    def place(first_B: jax.Array) -> tuple[jax.Array, int, jax.Array]:
        return first_B - shift, block + shift, first_B

    one_block, kept = runner.run(place, keep=False), runner.run(place, keep=True)
    both = runner.run(lambda first: (first - block - shift, 2 * block + shift, first - block), keep=True)

    def predict(cache: Cache, tokens_BL: jax.Array, turn: Turn) -> tuple[jax.Array, Cache, jax.Array]:
        block_B = (turn.first - plan.first_column) // block
        is_behind_B = (block_B > cache.state) & ~turn.finished
        answered_B = jnp.ones_like(is_behind_B)

        def together() -> tuple[jax.Array, Cache, jax.Array]:
            logits, columns = both(cache.columns, tokens_BL, turn.first)
            return logits, Cache(columns, jnp.where(is_behind_B, block_B, cache.state)), answered_B

        def alone() -> tuple[jax.Array, Cache, jax.Array]:
            logits, columns = one_block(cache.columns, tokens_BL, turn.first)
            return logits, Cache(columns, cache.state), answered_B

        def mixed() -> tuple[jax.Array, Cache, jax.Array]:
            first_B = turn.first - block * is_behind_B
            logits, columns = kept(cache.columns, tokens_BL, first_B, turn.first)
            return logits, Cache(columns, cache.state + is_behind_B), ~is_behind_B

        if one_pass_a_block:
            return together()
        none_behind = everywhere(~is_behind_B.any())
        if len(tokens_BL) == 1 or 2 * block * len(tokens_BL) <= TOKENS_OF_ONE_READ:
            return jax.lax.cond(none_behind, alone, together)
        all_behind = everywhere((is_behind_B | turn.finished).all())
        return jax.lax.switch(jnp.where(none_behind, 0, jnp.where(all_behind, 1, 2)), [alone, together, mixed])

    return predict


def _by_canvases(whole: Forward, later: Forward, sampling: Sampling, one_pass_a_block: bool) -> Predict:
    """Returns `predict` of "prefix" and "dual"."""

    def predict(cache: Cache, tokens_BL: jax.Array, turn: Turn) -> tuple[jax.Array, Cache, jax.Array]:
        every = sampling.refresh_interval
        is_due_B = (turn.step if every is None else turn.step % every) == 0
        is_due_B &= (cache.state == 0) & ~turn.waits

        def opened() -> tuple[jax.Array, Cache, jax.Array]:
            logits, columns = whole(cache.columns, tokens_BL, turn.first)
            return logits, Cache(columns, cache.state), jnp.ones_like(is_due_B)

        def continued() -> tuple[jax.Array, Cache, jax.Array]:
            logits, columns = later(cache.columns, tokens_BL, turn.first)
            return logits, Cache(columns, jnp.where(is_due_B, cache.state, 0)), ~is_due_B

        if one_pass_a_block:
            return opened()
        return jax.lax.cond(everywhere((is_due_B | turn.waits).all()), opened, continued)

    return predict


class _Runner:
    """Runs windows of a canvas through the model. With guidance every row has a twin whose given tokens are masked."""

    def __init__(self, decoder: Decoder, block_length: int, canvas: Canvas, cfg_scale: jax.Array | None):
        self._decoder, self._block_length = decoder, block_length
        self._canvas, self._cfg_scale = canvas, cfg_scale
        valid_BL = self._twice(canvas.valid)
        self._rows = Layout(positions_of(valid_BL), valid_BL, self._twice(canvas.prompt_lengths))

    def run(self, place: Callable[[jax.Array], tuple[Any, int, Any]], keep: bool) -> Forward:
        """Returns a pass over the window that `place` selects; `keep`: whether its keys are written to the cache.

        The pass takes the first column of the block that runs, and that of the active block if it differs.
        """

        def one_pass(cache: Any, tokens_BL: jax.Array, first_B, active_B=None) -> tuple[jax.Array, Any]:
            first_B = self._twice(first_B)
            start, length, written_from = place(first_B)
            tokens_BT, rows = columns_from(self._with_twins(tokens_BL), start, length), self._rows.part(start, length)
            if self._decoder.diffusion.finished_is_prompt:
                active_B = first_B if active_B is None else self._twice(active_B)
                rows = rows.replace(prompt_lengths=self._rows.part(active_B, 1).positions[:, 0])
            keys, window, cached = None, None, {}
            if cache is not None:
                keys, window, cached = self._rows, Window(start, written_from), {"cache": cache}
            hidden_BTD = self._states(tokens_BT, rows, keys, window, cached, keep)
            if keep:
                hidden_BTD, updated = hidden_BTD
                cache = updated["cache"]
            at_B = first_B - self._decoder.diffusion.shift - start
            hidden_BTD = columns_from(hidden_BTD, at_B, self._block_length)
            return self._logits(hidden_BTD), cache

        return one_pass

    def prefilled(self, columns: int) -> Any:
        """Returns a cache for the whole canvas, with the first `columns` columns run through the model.

        With 0 columns, one still runs, for its shapes and shardings. The first pass overwrites it.
        """
        columns = max(columns, 1)
        rest = self._rows.valid.shape[1] - columns
        tokens_BT, rows = self._with_twins(self._canvas.tokens)[:, :columns], self._rows.part(0, columns)
        _, updated = self._states(tokens_BT, rows, keep=True)
        return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, rest), (0, 0), (0, 0)]), updated["cache"])

    def _states(self, tokens_BT, rows: Layout, keys=None, window=None, cached=(), keep=False) -> Any:
        """Returns hidden states [B, T, D]; with `keep` also the collections with the keys and values."""
        decoder = self._decoder
        variables, mutable = {**decoder.variables, **dict(cached)}, ["cache"] if keep else False
        if decoder.reads_in_place(tokens_BT, tokens_BT.size):
            variables = in_stacks(variables, decoder.model.config, tokens_BT.size)
        view = decoder.diffusion.view(rows, keys)
        return decoder.model.apply(variables, tokens_BT, rows.positions, view, None, window, mutable=mutable)

    def _logits(self, hidden_BTD: jax.Array) -> jax.Array:
        logits_BTV = self._decoder.logits(hidden_BTD)
        if self._cfg_scale is None:
            return logits_BTV
        with_prompt, without = jnp.split(logits_BTV, 2)
        return without + (self._cfg_scale + 1) * (with_prompt - without)

    def _twice(self, x: jax.Array) -> jax.Array:
        return x if self._cfg_scale is None else jnp.concatenate([x, x])

    def _with_twins(self, tokens_BL: jax.Array) -> jax.Array:
        if self._cfg_scale is None:
            return tokens_BL
        given_BL = self._canvas.valid & ~self._canvas.fillable
        return jnp.concatenate([tokens_BL, jnp.where(given_BL, self._decoder.diffusion.mask_token_id, tokens_BL)])
