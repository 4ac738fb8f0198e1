"""Families of models that share weights and rules. Rows of all members share one forward pass.

The adapters of a family are joined into one, and each row's gate selects its own (`models.lora.joined_adapters`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.models.lora import joined_adapters
from difflm_jax.models.transformer import head_logits
from difflm_jax.sampling.caches import Decoder


@struct.dataclass
class Weights:
    """The arrays and static data of a family. X: members; R: total rank of their adapters."""

    decoder: Decoder
    owners: jax.Array | None = None  # [X, R] bool, the ranks that belong to each member; None: there is one member
    mask_rows: jax.Array | None = None  # [X, D], each member's embedding of the mask token

    def of(self, index_B: jax.Array) -> tuple[dict[str, Any], jax.Array | None]:
        """Returns (variables, gate [B, R]) for rows of these members. The gate is None if there is one member."""
        if self.owners is None:
            return self.decoder.variables, None
        lora = {**self.decoder.variables["lora"], "mask_row": self.mask_rows[index_B][:, None]}
        return {**self.decoder.variables, "lora": lora}, self.owners[index_B]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V]. The mask token, which is never drawn, has the base's logit."""
        decoder = self.decoder
        return head_logits(decoder.model.config, decoder.variables["params"], None, None, hidden)


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """The weights of a family and its members' names, in index order."""

    weights: Weights
    names: tuple[str, ...]

    def index(self, name: str) -> int:
        return self.names.index(name)


def families(models: Mapping[str, LanguageModel]) -> list[Family]:
    """Groups models that can share a batch. Raises `UserError` for a model that is sharded over devices."""
    groups: dict[Any, list[str]] = {}
    for name, lm in models.items():
        if lm.mesh is not None:
            raise UserError(f"model {name}: it is divided over devices; the server runs on one: load it without a mesh")
        # Defaults of decoding may differ within a family.
        rules = dataclasses.replace(lm.diffusion, algorithm="confidence", draft_length=0)
        ends = (lm.eos_token_ids, lm.pad_token_id)
        key = (id(lm.params), lm.model.clone(lora=None), rules, ends)
        if lm.lora is None and rules.attention == "causal":
            key = (*key, "base")  # a causal base uses another loop, which reads no adapter
        groups.setdefault(key, []).append(name)
    return [_family({name: models[name] for name in names}) for names in groups.values()]


def _family(models: dict[str, LanguageModel]) -> Family:
    first, *others = models.values()
    if all(lm.lora is first.lora for lm in others):
        return Family(Weights(first.decoder), tuple(models))
    adapters = [None if lm.lora is None else (lm.lora, lm.model.lora) for lm in models.values()]
    lora, config, owners = joined_adapters(adapters)
    table_VD = first.params["embed_tokens"]["weight"]
    own_row = table_VD[first.mask_token_id].astype(jnp.float32)
    mask_rows = [own_row if lm.lora is None else lm.lora.get("mask_row", own_row) for lm in models.values()]
    decoder = dataclasses.replace(first.decoder, variables={"params": first.params, "lora": lora})
    decoder = decoder.replace(model=first.model.clone(lora=config))
    return Family(Weights(decoder, jnp.asarray(owners), jnp.stack(mask_rows)), tuple(models))
