"""The programs that compute the attention product: one is chosen by name, and none stands in for another."""

import jax
import jax.numpy as jnp

from difflm_jax.errors import UserError, one_line
from difflm_jax.ops.attention import attend

CUDNN, PALLAS = "cudnn", "pallas"
# jax's primitives of fused kernels, which it computes again whether their results are kept by name or not, unless a
# remat policy asks for them; and `training.costs` counts them.
CUDNN_FORWARD, CUDNN_BACKWARD = "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"
PALLAS_CALL = "pallas_call"
FUSED_FORWARD = (CUDNN_FORWARD, PALLAS_CALL)  # what a layer's forward pass may have of them


def attend_in_xla(q_BTHE, k_BSKE, v_BSKE, mask_BTS: jax.Array, lengths_B: jax.Array | None) -> jax.Array:
    """`attend`, which takes any mask as it is."""
    return attend(q_BTHE, k_BSKE, v_BSKE, mask_BTS)


def attend_in_cudnn(q_BTHE, k_BSKE, v_BSKE, mask_BTS: jax.Array, lengths_B: jax.Array | None) -> jax.Array:
    """[B, T, H, E]: what `attend` gives, by one fused kernel that puts no score into memory; bfloat16, NVIDIA GPUs.

    With `lengths_B` a query sees the first so many keys of its row, which is all that the mask says, and the kernel
    needs none. Else the mask goes in as a bias [B, 1, T, S], which cost it 1.7 times the time on an H200. A query that
    sees nothing (padding) gives a mean of values here instead of zero; nothing reads it. Raises `UserError` where the
    kernel is not there or does not take these heads.
    """
    queries, keys = q_BTHE.shape[1], k_BSKE.shape[1]
    if queries % 2 or keys % 2:  # what the kernel has no backward pass for
        odd_queries, odd_keys = (0, queries % 2), (0, keys % 2)
        q_BTHE = jnp.pad(q_BTHE, ((0, 0), odd_queries, (0, 0), (0, 0)))
        k_BSKE, v_BSKE = (jnp.pad(x, ((0, 0), odd_keys, (0, 0), (0, 0))) for x in (k_BSKE, v_BSKE))
        mask_BTS = jnp.pad(mask_BTS, ((0, 0), odd_queries, odd_keys))
    seen = {"mask": mask_BTS[:, None]}
    if lengths_B is not None:
        # All queries, so that each of them is written; and one key at least, so that what is written is finite.
        seen = {"query_seq_lengths": jnp.full_like(lengths_B, queries)}
        seen["key_value_seq_lengths"] = jnp.maximum(lengths_B, 1)
    try:
        y_BTHE = jax.nn.dot_product_attention(q_BTHE, k_BSKE, v_BSKE, **seen, implementation=CUDNN)
    except (RuntimeError, NotImplementedError) as error:  # no cuDNN here, or a size of heads that it does not know
        raise UserError(f"attention_kernel={CUDNN!r}: {one_line(error)}") from error
    return y_BTHE[:, :queries]


def attend_in_pallas(q_BTHE, k_BSKE, v_BSKE, mask_BTS: jax.Array, lengths_B: jax.Array | None) -> jax.Array:
    """`tpu_attention.flash_attend`: no score is put into memory, and tiles of the mask that are empty cost nothing."""
    from difflm_jax.ops.attention_tpu import flash_attend  # Pallas takes its time to import

    return flash_attend(q_BTHE, k_BSKE, v_BSKE, mask_BTS)


KERNELS = {"xla": attend_in_xla, CUDNN: attend_in_cudnn, PALLAS: attend_in_pallas}


def check_kernel(name: str, dtype: str, platform: str) -> None:
    """Raises `UserError` where devices of `platform` do not have the kernel `name` for `dtype`."""
    if name == PALLAS and platform != "tpu":
        raise UserError(f"attention_kernel={PALLAS!r} needs TPUs, not a {platform!r}")
    if name == CUDNN and platform not in ("gpu", "cuda"):
        raise UserError(f"attention_kernel={CUDNN!r} needs NVIDIA GPUs, not a {platform!r}")
    if name == CUDNN and dtype != "bfloat16":
        raise UserError(f"attention_kernel={CUDNN!r} computes in bfloat16, not in dtype={dtype!r}")
