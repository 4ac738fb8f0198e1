"""Weights in Hugging Face's layout: loads a `Source` into our tree, and saves our tree as a checkpoint directory."""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import PreTrainedTokenizerBase

from difflm_jax.checkpoint.bitsandbytes import bitsandbytes_config, bitsandbytes_tensors
from difflm_jax.checkpoint.diffusion_config import write_diffusion_config
from difflm_jax.checkpoint.experts import join_experts
from difflm_jax.checkpoint.names import REDUNDANT_SUFFIXES, get_path, set_path
from difflm_jax.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, describe_faults, write_file
from difflm_jax.checkpoint.source import Source
from difflm_jax.distributed.sharding import place_leaf, shardings_of, to_host, to_mesh
from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.weights import Row, joined_rows, table
from difflm_jax.quant import QTensor, QuantConfig, dequantize, quantize
from difflm_jax.utils.files import new_directory
from difflm_jax.utils.progress import Progress

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MAX_SHARD_BYTES = 5_000_000_000


def load_params(
    source: Source, dtype: Any, quantization: QuantConfig | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Loads the tree of `models.weights.table`, layers stacked on axis 0: arrays of `dtype`, or `QTensor`s.

    quantization: how to quantise projections while they are loaded. Those that are quantised in the checkpoint are
      unchanged.
    mesh: if given, each tensor is divided over its devices (`sharding.specs`) before the next is read. So a host or a
      device has no more of the model than its part and one tensor.

    Tensors are read one at a time, converted on the device and written into the stack. So memory is needed for the
    loaded part and one or two tensors. Raises `UserError` listing all unknown, missing, duplicate and misshapen tensors
    before any is read.
    """
    check_tensors(source)
    check_quantization(source, quantization)
    if source.stored:
        quantization = None  # keep the checkpoint's choice of quantised tensors
    params: dict[str, Any] = {}
    rows = table(source.config)
    what = f"loading {source.name}" if quantization is None else f"loading and quantising {source.name}"
    with Progress(what, "tensors", sum(len(row.hf_names) for row in rows)) as progress:
        for row in rows:
            held = quantization if row.quantisable else None
            leaf = _load_leaf(source, row, jnp.dtype(dtype), held, mesh, progress)
            set_path(params, row.path, leaf)
    return params


def abstract_params(config: ModelConfig, dtype: Any, quantization: QuantConfig | None) -> dict[str, Any]:
    """Returns the shapes and dtypes of `load_params` for a checkpoint that is not quantised."""
    params: dict[str, Any] = {}
    for row in table(config):
        weight = jax.ShapeDtypeStruct(row.shape, dtype)
        leaf = jax.eval_shape(functools.partial(_convert, dtype, quantization if row.quantisable else None), weight)
        set_path(params, row.path, _stack_of(leaf, row.stack))
    return params


def check_quantization(source: Source, quantization: QuantConfig | None) -> None:
    """Raises `UserError` if the projections cannot be quantised as requested."""
    if quantization is None:
        return
    if other := [name for name, stored in source.stored.items() if stored != quantization]:
        raise UserError(
            f"{source.name}: {other[0]} is held as {source.stored[other[0]]} already; leave quantization empty"
        )
    widths = {(row.path[-2], row.shape[1]) for row in table(source.config) if row.quantisable}
    if odd := [f"{name} ({width})" for name, width in sorted(widths) if width % quantization.block_size]:
        raise UserError(
            f"quantization_block_size={quantization.block_size} does not divide the input features of {', '.join(odd)}"
        )


def _load_leaf(
    source: Source, row: Row, dtype: Any, quantization: QuantConfig | None, mesh: Mesh | None, progress: Progress
) -> jax.Array | QTensor:
    names = row.hf_names
    stored = {source.stored.get(name) for name in names}
    if len(stored) > 1:
        # A scan needs layers of one kind. Quantising the others too would change the model.
        print(f"{row.hf}: quantised in some layers only; all of them are held in {dtype.name}", flush=True)
        quantization = None
    leaf = None
    for index, name in enumerate(names):
        tensor = source.read(name)
        progress.advance()
        if isinstance(tensor, QTensor) and len(stored) > 1:
            tensor = dequantize(tensor, dtype)
        tensor = jax.device_put(tensor)
        if mesh is not None:
            leaf = _put_on_mesh(leaf, row, index, _converted(tensor, dtype, quantization), mesh)
            continue
        if not row.stacked:
            return _converted(tensor, dtype, quantization)
        if leaf is None:
            shapes = jax.eval_shape(functools.partial(_convert, dtype, quantization), tensor)
            leaf = jax.tree.map(lambda part: jnp.empty(part.shape, part.dtype), _stack_of(shapes, row.stack))
        # The next tensor is read while this one is written into the stack, unless quantising it needs memory. Waiting
        # for the previous write keeps tensors of a fast disk from piling up.
        leaf = _put(jax.block_until_ready(leaf), tensor, _place(row, index), dtype, quantization)
        if quantization is not None:
            jax.block_until_ready(leaf)
    return jax.block_until_ready(leaf)


def _convert(dtype: Any, quantization: QuantConfig | None, tensor: jax.Array | QTensor) -> jax.Array | QTensor:
    """Converts a tensor of a checkpoint to the form in which the model stores it."""
    if isinstance(tensor, QTensor):
        return tensor
    return tensor.astype(dtype) if quantization is None else quantize(tensor, quantization)


def _converted(tensor: jax.Array | QTensor, dtype: Any, quantization: QuantConfig | None) -> jax.Array | QTensor:
    if quantization is None and not isinstance(tensor, QTensor) and tensor.dtype == dtype:
        return tensor  # a compiled function would copy it
    return _compiled_convert(dtype, quantization, tensor)


_compiled_convert = jax.jit(_convert, static_argnums=(0, 1))


def _place(row: Row, index: int) -> tuple[np.int32, ...]:
    """Returns the index in a leaf's stack of its tensor number `index`: (layer,) or (layer, expert)."""
    return tuple(map(np.int32, np.unravel_index(index, row.stack)))


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _put(leaf, tensor, place, dtype, quantization):
    """Writes the converted `tensor` into the donated `leaf` at `place`, without a copy of the leaf."""
    converted = _convert(dtype, quantization, tensor)
    return jax.tree.map(lambda stack, part: _with_part(stack, part, place), leaf, converted)


def _with_part(stack: jax.Array, part: jax.Array, place: tuple[jax.Array, ...]) -> jax.Array:
    """Returns `stack` with `part` at `place`.

    The update uses integers: to update a bfloat16 stack, XLA's CPU backend converts all of it to float32 and back.
    """
    bits = np.dtype(f"uint{8 * stack.dtype.itemsize}")
    stack_bits, part_bits = (jax.lax.bitcast_convert_type(x, bits) for x in (stack, part))
    start = (*place, *(0,) * part.ndim)
    changed = jax.lax.dynamic_update_slice(stack_bits, part_bits.reshape((1,) * len(place) + part.shape), start)
    return jax.lax.bitcast_convert_type(changed, stack.dtype)


def _put_on_mesh(leaf: Any, row: Row, index: int, converted: Any, mesh: Mesh) -> Any:
    """Writes a tensor that was converted on one device into a leaf that is divided over the mesh."""
    if not row.stacked:
        return place_leaf(row.path, converted, mesh)
    layout = shardings_of(row.path, _stack_of(converted, row.stack), mesh)
    if leaf is None:
        empty = functools.partial(jax.tree.map, lambda part: jnp.zeros(part.shape, part.dtype))
        leaf = jax.jit(lambda: empty(_stack_of(converted, row.stack)), out_shardings=layout)()
    one = jax.tree.map(lambda sharding: NamedSharding(mesh, PartitionSpec(*sharding.spec[len(row.stack) :])), layout)
    part = jax.tree.map(to_mesh, converted, one)
    return jax.block_until_ready(_set_part(leaf, part, _place(row, index), tuple(jax.tree.leaves(layout))))


@functools.partial(jax.jit, static_argnames="layout", donate_argnums=0)
def _set_part(leaf, part, place, layout):
    """Writes `part` into the donated `leaf` at `place`, without a copy. `layout` has the shardings of its arrays."""

    def put(stack, one, sharding):
        return jax.lax.with_sharding_constraint(_with_part(stack, one, place), sharding)

    return jax.tree.map(put, leaf, part, jax.tree.unflatten(jax.tree.structure(leaf), layout))


def _stack_of(shapes: Any, stack: tuple[int, ...]) -> Any:
    return jax.tree.map(lambda part: jax.ShapeDtypeStruct((*stack, *part.shape), part.dtype), shapes)


def check_tensors(source: Source) -> None:
    """Raises one `UserError` that lists all differences between the tensors of `source` and those of its config."""
    expected = {name: row.shape for row in table(source.config) for name in row.hf_names}
    found = {name: shape for name, shape in source.shapes.items() if not name.endswith(REDUNDANT_SUFFIXES)}
    if _EMBEDDING not in found and "embed_tokens.weight" in found:
        raise UserError(
            f"{source.name}: tensor names lack the prefix 'model.' (embed_tokens.weight): this is a bare decoder; save "
            "it from AutoModelForCausalLM"
        )
    tied_copy = source.config.tie_word_embeddings and found.pop(_HEAD, None) is not None
    misshapen = [
        f"{name} {list(found[name])} for {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    missing = [name for name in expected if name not in found]
    optional = () if missing else source.unindexed  # transformers ignores them, but a missing tensor may be among them
    faults = {
        "unknown": [name for name in found if name not in expected and name not in optional],
        "missing": missing,
        "misshapen": misshapen,
        "defective": source.defects,
    }
    if text := describe_faults(faults):
        raise UserError(f"{source.name}: tensors do not fit its config: {text}")
    if tied_copy and not _equal(source.read(_HEAD), source.read(_EMBEDDING)):
        raise UserError(
            f"{source.name}: {_HEAD} differs from {_EMBEDDING}, though config.json says tie_word_embeddings; set that "
            "to false or remove the tensor"
        )


def save_pretrained(
    directory: str | Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    hf_config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    model_card: str,
    diffusion_config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint that transformers loads: safetensors, configs, tokenizer, model card, all or nothing.

    The dtype is that of `params`; NF4 weights are written in bitsandbytes' layout. Above `MAX_SHARD_BYTES` the tensors
    are split over files with an index. Raises `UserError` if `directory` is not empty or cannot be written, and for
    weights in a format that Hugging Face checkpoints do not have.
    """
    dtype = _dtype_name(params)
    stored = {**hf_config, "dtype": dtype, "torch_dtype": dtype}  # transformers 4 reads torch_dtype
    quantised = [row for row in table(config) if isinstance(get_path(params, row.path), QTensor)]
    if any(row.experts for row in quantised):
        raise UserError(
            "save_pretrained: transformers holds the experts of a layer in one tensor, which bitsandbytes does not "
            "quantise; merge an adapter first, or load the model without quantization"
        )
    if any(row.fused for row in quantised):
        raise UserError(
            f"save_pretrained: {config.model_type} checkpoints hold projections joined ({config.fused[0][0]}), and "
            "quantised ones are not joined; merge an adapter first, or load the model without quantization"
        )
    if quantised:
        weight = get_path(params, quantised[0].path)
        if weight.format != "nf4":
            raise UserError(
                f"save_pretrained: no Hugging Face checkpoint holds {weight.format} weights; merge an adapter first, "
                "or load the model without quantization"
            )
        held = {row.path for row in quantised}
        skipped = [row.path[-2] for row in table(config) if row.quantisable and row.path not in held]
        stored["quantization_config"] = bitsandbytes_config(weight, ["lm_head", *skipped], dtype)
    with new_directory(directory) as fresh:
        _write_tensors(fresh, params, config)
        (fresh / "config.json").write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if generation_config:
            text = json.dumps(dict(generation_config), indent=2, sort_keys=True) + "\n"
            (fresh / "generation_config.json").write_text(text, encoding="utf-8")
        (fresh / "README.md").write_text(model_card, encoding="utf-8")
        write_diffusion_config(fresh, diffusion_config)
        tokenizer.save_pretrained(fresh)


def _write_tensors(directory: Path, params: Mapping[str, Any], config: ModelConfig) -> None:
    shards = _shards(params, config)
    with Progress("writing the checkpoint", "tensors", sum(map(len, shards))) as progress:
        _write_shards(directory, params, config, shards, progress)


def _write_shards(
    directory: Path, params: Mapping[str, Any], config: ModelConfig, shards: list[list[str]], progress: Progress
) -> None:
    if len(shards) == 1:
        write_file(directory / SINGLE_FILE, _tensors(params, config, shards[0], progress))
        return
    weight_map, total = {}, 0
    for index, names in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors = _tensors(params, config, names, progress)
        write_file(directory / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(params: Mapping[str, Any], config: ModelConfig) -> list[list[str]]:
    """Returns the names of the weights per file, in the order of the table. A file has at most `MAX_SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for rows in joined_rows(config):
        names = rows[0].fused_names
        size = sum(get_path(params, row.path).nbytes for row in rows) // len(names)
        for name in names:
            if shards[-1] and filled + size > MAX_SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
    return shards


def _tensors(
    params: Mapping[str, Any], config: ModelConfig, wanted: Iterable[str], progress: Progress
) -> dict[str, np.ndarray]:
    """Returns the tensors that store the weights `wanted`. Each leaf is copied to the host once."""
    wanted, tensors = set(wanted), {}
    for rows in joined_rows(config):
        names = rows[0].fused_names
        if wanted.isdisjoint(names):
            continue
        leaves = [_on_host(params, row, len(names)) for row in rows]
        for index, name in enumerate(names):
            if name not in wanted:
                continue
            parts = [
                jax.tree.map(lambda part, i=index: part[i], leaf) if row.stacked else leaf
                for row, leaf in zip(rows, leaves, strict=True)
            ]
            if isinstance(parts[0], QTensor):
                tensors |= bitsandbytes_tensors(name, parts[0], _dtype_name(params))
            elif rows[0].experts and rows[0].fused:
                tensors[name] = join_experts(config.experts, parts, rows[0].path[-1] == "weight")
            else:
                tensors[name] = np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0], order="C")
            progress.advance()
    return tensors


def _on_host(params: Mapping[str, Any], row: Row, count: int) -> Any:
    """Returns a leaf on the host. A stack is reshaped to one entry for each of its `count` tensors in a checkpoint."""
    leaf = jax.tree.map(to_host, get_path(params, row.path))
    if not row.stacked:
        return leaf[: row.shape[0]]  # a table on a mesh is padded at its end
    stack = row.stack if count > len(row.layers) else row.stack[:1]
    return jax.tree.map(lambda part: part.reshape(count, *part.shape[len(stack) :]), leaf)


def _dtype_name(params: Mapping[str, Any]) -> str:
    return jnp.dtype(params["embed_tokens"]["weight"].dtype).name


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    return all(np.array_equal(x.astype(np.float32), y.astype(np.float32)) for x, y in zip(a, b, strict=True))
