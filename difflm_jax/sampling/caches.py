"""Models as the sampler sees them, and what a pass may leave out because its keys and values are known.

A cache stores the keys and values of every column of the canvas. A pass runs over a window of columns, whose keys
replace the cached ones; the other columns are only read:

  prompt  exact under `prefix` and `causal` attention: the prompt runs once, a pass is the whole answer
  blocks  exact under attention in blocks and `causal` attention: the prompt runs once, a pass is the active block; the
          first pass of a block runs over the finished block before it too, whose keys are then final
  prefix  Fast-dLLM (arXiv:2505.22618): the canvas runs at the start of a block, other passes are the block and what
          follows it, against the keys that came before it
  dual    Fast-dLLM: the same, and other passes are the active block alone

`prefix` and `dual` are approximations, for attention under which the keys of a finished token still change.
`refresh_interval` recomputes them every so many passes of a block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from difflm_jax.diffusion.config import DiffusionConfig, Layout
from difflm_jax.distributed.sharding import over_rows
from difflm_jax.models.attention import Window, positions_of
from difflm_jax.models.stacks import in_stacks, stay_in_stacks
from difflm_jax.models.transformer import Transformer, head_logits
from difflm_jax.sampling.loop import Canvas, Carry, Loop, Plan, Predict
from difflm_jax.sampling.options import Sampling

Variables = dict[str, Any]  # {"params": ..., "lora": ...}


@struct.dataclass
class Decoder:
    """A model as decoding needs it: a pytree of its collections `variables`, all else static to `jax.jit`."""

    variables: Variables
    model: Transformer = struct.field(pytree_node=False)
    diffusion: DiffusionConfig = struct.field(pytree_node=False)
    eos_token_ids: tuple[int, ...] = struct.field(pytree_node=False, default=())
    pad_token_id: int = struct.field(pytree_node=False, default=0)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)  # over which `variables` and rows are divided

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D]."""
        params, lora = self.variables["params"], self.variables.get("lora")
        in_place = self.reads_in_place(hidden, hidden.size // hidden.shape[-1])
        return head_logits(self.model.config, params, lora, self.model.mask_token_id, hidden, in_place)

    def reads_in_place(self, x: jax.Array, rows: int) -> bool:
        """Whether passes over `rows` tokens, of which `x` is made, leave the weights in their stacks."""
        return self.mesh is None and stay_in_stacks(self.model, x, rows)


def fill(decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling) -> Carry:
    """Fills a canvas (`fill_on` is this, compiled). Returns what belongs to rows of the last carry."""

    def rows(variables: Variables, canvas: Canvas) -> Carry:
        loop, start = loop_over(decoder.replace(variables=variables), plan, canvas, sampling)
        return loop.run(start).replace(cache=None, block=None, step=None)

    return over_rows(rows, decoder.mesh, decoder.variables, canvas)


# Compiles once for each shape of canvas and plan and each set of options that is on; the number of passes is data.
_compiled = functools.partial(jax.jit, fill, static_argnames="plan")
_fill = _compiled()
# A pass over few tokens takes as long as reading the weights. XLA's own GEMMs copy the weights of a layer out of their
# stack first, and matmuls of one input are joined by writing their weights side by side; cuBLAS reads them in place.
# Qwen3-4B in blocks of 32 on an H200, per pass: 7.4 ms for 9.1 at batch 1, 10.6 for 15.1 at batch 8 (measured with the
# matmuls still joined).
_fill_on_gpu = _compiled(compiler_options={"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0})


def fill_on(platform: str) -> Callable[..., Carry]:
    """`fill`, compiled for devices of jax's `platform`."""
    return _fill_on_gpu if platform in ("gpu", "cuda") else _fill


def loop_over(decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling) -> tuple[Loop, Carry]:
    """The sampler's loop over a model, and its first carry."""
    predict, cache = make_predict(decoder, plan, canvas, sampling)
    loop = Loop(predict, canvas, plan, sampling, decoder.diffusion.mask_token_id, decoder.eos_token_ids)
    return loop, loop.start(cache)


def cache_kind(diffusion: DiffusionConfig, cache: str) -> str:
    """ "none", "prompt", "blocks", "prefix" or "dual": what `cache` means under a rule; "auto" is never inexact."""
    return diffusion.exact_cache if cache == "auto" else cache


# (cache, tokens, first column of the active block) -> (logits of the block, cache)
Forward = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


def make_predict(decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling) -> tuple[Predict, Any]:
    """`predict` and its first cache, by the kind of cache (see the head of this file)."""
    diffusion = decoder.diffusion
    kind = cache_kind(diffusion, sampling.cache)
    block, columns = plan.block_length, canvas.tokens.shape[1]
    shift = diffusion.shift  # windows begin that much earlier
    answer = plan.first_column - shift
    known = answer if kind != "none" and diffusion.exact_cache != "none" else 0  # columns that never run again
    runner = _Runner(decoder, block, canvas, sampling.cfg_scale)

    # Each pass: (first column of the block) -> (first column, number of columns, column that is first to be written)
    whole = runner.run(lambda first: (known, columns - known, known), keep=kind in ("prefix", "dual"))
    rest = runner.run(lambda first: (answer, columns - answer, first), keep=False)
    one_block = runner.run(lambda first: (first - shift, block + shift, first), keep=False)
    two_blocks = runner.run(lambda first: (first - block - shift, 2 * block + shift, first - block), keep=True)
    opening, later = {
        "none": (whole, whole),
        "prompt": (whole, whole),
        "blocks": (two_blocks, one_block),
        "prefix": (whole, rest),
        "dual": (whole, one_block),
    }[kind]
    one_pass_a_block = plan.steps_per_block == 1 and sampling.edit_threshold is None

    def predict(cache: Any, tokens_BL: jax.Array, first: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
        if opening is later or one_pass_a_block:
            return opening(cache, tokens_BL, first)
        in_turn = step if sampling.refresh_interval is None else step % sampling.refresh_interval
        return jax.lax.cond(in_turn == 0, opening, later, cache, tokens_BL, first)

    return predict, None if kind == "none" else runner.prefilled(known)


class _Runner:
    """Runs windows of a canvas through the model. With guidance every row has a twin whose given tokens are masked."""

    def __init__(self, decoder: Decoder, block_length: int, canvas: Canvas, cfg_scale: jax.Array | None):
        self._decoder, self._block_length = decoder, block_length
        self._canvas, self._cfg_scale = canvas, cfg_scale
        valid_BL = self._twice(canvas.valid)
        self._rows = Layout(positions_of(valid_BL), valid_BL, self._twice(canvas.prompt_lengths))

    def run(self, place: Callable[[jax.Array], tuple[Any, int, Any]], keep: bool) -> Forward:
        """A pass over the window that `place` names; `keep`: the keys that it writes stay in the cache."""

        def one_pass(cache: Any, tokens_BL: jax.Array, first: jax.Array) -> tuple[jax.Array, Any]:
            start, length, written_from = place(first)
            tokens_BT = jax.lax.dynamic_slice_in_dim(self._with_twins(tokens_BL), start, length, axis=1)
            rows = self._rows.part(start, length)
            if self._decoder.diffusion.finished_is_prompt:
                rows = rows.replace(prompt_lengths=self._rows.part(first, 1).positions[:, 0])
            keys, window, cached = None, None, {}
            if cache is not None:
                keys, window, cached = self._rows, Window(start, written_from), {"cache": cache}
            hidden_BTD = self._states(tokens_BT, rows, keys, window, cached, keep)
            if keep:
                hidden_BTD, updated = hidden_BTD
                cache = updated["cache"]
            hidden_BTD = jax.lax.dynamic_slice_in_dim(
                hidden_BTD, first - self._decoder.diffusion.shift - start, self._block_length, axis=1
            )
            return self._logits(hidden_BTD), cache

        return one_pass

    def prefilled(self, columns: int) -> Any:
        """A cache for the whole canvas with the first `columns` columns run through the model.

        With 0 columns one is run all the same, for the shapes and shardings; the first pass replaces it.
        """
        columns = max(columns, 1)
        rest = self._rows.valid.shape[1] - columns
        tokens_BT, rows = self._with_twins(self._canvas.tokens)[:, :columns], self._rows.part(0, columns)
        _, updated = self._states(tokens_BT, rows, keep=True)
        return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, rest), (0, 0), (0, 0)]), updated["cache"])

    def _states(self, tokens_BT, rows: Layout, keys=None, window=None, cached=(), keep=False) -> Any:
        """Hidden states [B, T, D]; with `keep` also the collections that hold the keys and values."""
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
