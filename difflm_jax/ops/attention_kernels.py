"""The attention kernels. One is chosen by name; none is a fallback for another."""

import jax
import jax.numpy as jnp

from difflm_jax.errors import UserError, one_line
from difflm_jax.ops.attention import attend

CUDNN, PALLAS = "cudnn", "pallas"
# Remat recomputes these primitives even if their outputs are named; a policy must save the primitives themselves.
CUDNN_FORWARD, CUDNN_BACKWARD = "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"
PALLAS_CALL = "pallas_call"
FUSED_FORWARD = (CUDNN_FORWARD, PALLAS_CALL)  # those that may be in a layer's forward pass


def scaled(q_BTHE: jax.Array, scale: float) -> jax.Array:
    """Rescales queries so that the kernels, whose own factor is width ** -0.5, compute scores with factor `scale`."""
    factor = scale * q_BTHE.shape[-1] ** 0.5
    return q_BTHE * factor if abs(factor - 1.0) > 1e-9 else q_BTHE


def attend_with(
    kernel: str,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    mask_BTS: jax.Array,
    lengths_B: jax.Array | None,
    softcap: float | None = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """[B, T, H, E]: attention of `qkv` (queries, keys, values), computed by the named kernel.

    `softcap` caps the scores. A head with a sink also sees a key with that score and value zero. Raises `UserError` for
    a kernel that cannot cap scores.
    """
    q_BTHE, k_BSKE, v_BSKE = qkv
    width = q_BTHE.shape[-1]
    if softcap is not None and kernel != "xla":
        raise UserError(f"attention_kernel={kernel!r} cannot cap scores (attn_logit_softcapping={softcap}); use 'xla'")
    if softcap is not None and sinks_H is not None:
        raise NotImplementedError("no family has both capped scores and sinks")
    if sinks_H is not None:
        q_BTHE, k_BSKE, v_BSKE, mask_BTS = _with_sinks(q_BTHE, k_BSKE, v_BSKE, mask_BTS, sinks_H)
        lengths_B = None if lengths_B is None else lengths_B + 1
    if softcap is not None:
        return attend(q_BTHE, k_BSKE, v_BSKE, mask_BTS, softcap)
    return KERNELS[kernel](q_BTHE, k_BSKE, v_BSKE, mask_BTS, lengths_B)[..., :width]


def _with_sinks(q_BTHE, k_BSKE, v_BSKE, mask_BTS, sinks_H):
    """Prepends a key whose score is the sink's for every query. Returns (q, k, v, mask).

    Heads get one more element for it, and zeros up to the multiple of eight that kernels require.
    """
    width = q_BTHE.shape[-1]
    wide = width + 8
    own_BTH1 = jnp.broadcast_to((sinks_H.astype(jnp.float32) * wide**0.5)[:, None], (*q_BTHE.shape[:-1], 1))
    none = [(0, 0)] * 3
    q_BTHE = jnp.concatenate([q_BTHE * (wide / width) ** 0.5, own_BTH1.astype(q_BTHE.dtype)], axis=-1)
    q_BTHE = jnp.pad(q_BTHE, [*none, (0, 7)])
    k_BSKE, v_BSKE = (jnp.pad(x, [(0, 0), (1, 0), (0, 0), (0, 8)]) for x in (k_BSKE, v_BSKE))
    k_BSKE = k_BSKE.at[:, 0, :, width].set(1)
    return q_BTHE, k_BSKE, v_BSKE, jnp.pad(mask_BTS, [(0, 0), (0, 0), (1, 0)], constant_values=True)


def attend_in_xla(q_BTHE, k_BSKE, v_BSKE, mask_BTS: jax.Array, lengths_B: jax.Array | None) -> jax.Array:
    """Computes `attend`, which takes any mask."""
    return attend(q_BTHE, k_BSKE, v_BSKE, mask_BTS)


def attend_in_cudnn(q_BTHE, k_BSKE, v_BSKE, mask_BTS: jax.Array, lengths_B: jax.Array | None) -> jax.Array:
    """[B, T, H, E]: `attend` in one fused kernel that writes no scores to memory; bfloat16 on NVIDIA GPUs.

    With `lengths_B`, which is equivalent to the mask, a query sees that many first keys of its row. Else the mask is
    passed as a bias [B, 1, T, S], which took 1.7 times as long on an H200. A query that sees no key (padding) returns a
    mean of values instead of zero, which is unused. Raises `UserError` if the kernel is missing or does not support
    these heads.
    """
    queries, keys = q_BTHE.shape[1], k_BSKE.shape[1]
    if queries % 2 or keys % 2:  # the kernel has no backward pass for odd lengths
        odd_queries, odd_keys = (0, queries % 2), (0, keys % 2)
        q_BTHE = jnp.pad(q_BTHE, ((0, 0), odd_queries, (0, 0), (0, 0)))
        k_BSKE, v_BSKE = (jnp.pad(x, ((0, 0), odd_keys, (0, 0), (0, 0))) for x in (k_BSKE, v_BSKE))
        mask_BTS = jnp.pad(mask_BTS, ((0, 0), odd_queries, odd_keys))
    seen = {"mask": mask_BTS[:, None]}
    if lengths_B is not None:
        # All queries, so that every output is written; at least one key, so that outputs are finite.
        seen = {"query_seq_lengths": jnp.full_like(lengths_B, queries)}
        seen["key_value_seq_lengths"] = jnp.maximum(lengths_B, 1)
    try:
        y_BTHE = jax.nn.dot_product_attention(q_BTHE, k_BSKE, v_BSKE, **seen, implementation=CUDNN)
    except (RuntimeError, NotImplementedError) as error:  # no cuDNN here, or a size of heads that it does not know
        raise UserError(f"attention_kernel={CUDNN!r}: {one_line(error)}") from error
    return y_BTHE[:, :queries]


def attend_in_pallas(q_BTHE, k_BSKE, v_BSKE, mask_BTS: jax.Array, lengths_B: jax.Array | None) -> jax.Array:
    """Computes `attention_tpu.flash_attend`: writes no scores to memory and skips empty tiles of the mask."""
    from difflm_jax.ops.attention_tpu import flash_attend  # Pallas is slow to import

    return flash_attend(q_BTHE, k_BSKE, v_BSKE, mask_BTS)


KERNELS = {"xla": attend_in_xla, CUDNN: attend_in_cudnn, PALLAS: attend_in_pallas}


def check_kernel(name: str, dtype: str, platform: str) -> None:
    """Raises `UserError` if devices of `platform` lack the kernel `name` for `dtype`."""
    if name == PALLAS and platform != "tpu":
        raise UserError(f"attention_kernel={PALLAS!r} needs TPUs, not a {platform!r}")
    if name == CUDNN and platform not in ("gpu", "cuda"):
        raise UserError(f"attention_kernel={CUDNN!r} needs NVIDIA GPUs, not a {platform!r}")
    if name == CUDNN and dtype != "bfloat16":
        raise UserError(f"attention_kernel={CUDNN!r} computes in bfloat16, not in dtype={dtype!r}")
