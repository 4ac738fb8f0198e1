"""A transformers model as the references of `samplers.py` see one: without a cache, and with those of Fast-dLLM."""

import numpy as np
import torch
from transformers import DynamicCache


def bias_of(allowed: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The additive mask [1, 1, T, S] of `allowed` [T, S]."""
    return torch.where(torch.as_tensor(allowed), 0.0, torch.finfo(torch.float32).min)[None, None]


def allowed_by(rule: str, length: int, prompt: int, block: int = 0) -> np.ndarray:
    """[query, key] bool, each rule spelt out pair by pair."""
    seen = np.zeros((length, length), bool)
    for q in range(length):
        for k in range(length):
            if rule == "full":
                seen[q, k] = True
            elif rule == "prefix":
                seen[q, k] = k <= q or q >= prompt
            elif rule == "causal":
                seen[q, k] = k <= q
            elif rule == "block":
                if q < prompt:
                    seen[q, k] = k <= q
                else:
                    seen[q, k] = k < prompt or (k - prompt) // block <= (q - prompt) // block
    return seen


def shifted(logits: torch.Tensor, shift: bool) -> torch.Tensor:
    return torch.cat([logits[:1], logits[:-1]]) if shift else logits


class Uncached:
    """logits [L, V] of a row under an attention rule."""

    def __init__(self, model, rule: str, prompt: int, block: int = 0, shift: bool = False):
        self.model, self.rule, self.prompt, self.block, self.shift = model, rule, prompt, block, shift

    @torch.no_grad()
    def __call__(self, row: torch.Tensor) -> torch.Tensor:
        bias = bias_of(allowed_by(self.rule, len(row), self.prompt, self.block))
        return shifted(self.model(row[None], attention_mask=bias, use_cache=False).logits[0], self.shift)


class FastDllmCache:
    """Fast-dLLM's prefix and dual cache for full attention, with or without the shift, on real keys and values.

    `start` runs the whole row and keeps its keys; `again` runs the block and what follows it (prefix) or the block
    alone (dual) against the kept keys of all other columns, until `refresh` passes have been made.
    """

    def __init__(self, model, dual: bool, shift: bool, refresh: int = 10**9):
        self.model, self.dual, self.shift, self.refresh, self.age = model, dual, shift, refresh, 0

    @torch.no_grad()
    def start(self, row, first, end):
        self.cache, self.age = DynamicCache(config=self.model.config), 1
        out = self.model(
            row[None], attention_mask=bias_of(np.ones((len(row), len(row)), bool)), past_key_values=self.cache
        )
        return shifted(out.logits[0], self.shift)

    @torch.no_grad()
    def again(self, row, first, end):
        if self.age >= self.refresh:
            return self.start(row, first, end)
        self.age += 1
        stop = end if self.dual else len(row)
        logits = torch.zeros(len(row), self.model.config.vocab_size)
        own = self._run(row, first, stop, first, stop)
        if not self.shift:
            logits[first:stop] = own
        else:
            # The state before the block predicts its first token: its query sees the block's new keys, not its own.
            before = self._run(row, first - 1, stop, first, stop)
            logits[first:stop] = before[:-1]
        return logits

    def _run(self, row, query_from, query_to, key_from, key_to):
        """Columns query_from..query_to; keys key_from..key_to are theirs, all others the cached ones."""
        past = DynamicCache(config=self.model.config)
        for i, layer in enumerate(self.cache.layers):
            k, v = layer.keys, layer.values
            past.update(
                torch.cat([k[:, :, :key_from], k[:, :, key_to:]], 2),
                torch.cat([v[:, :, :key_from], v[:, :, key_to:]], 2),
                i,
            )
        queries, kept = query_to - query_from, past.get_seq_length()
        allowed = np.ones((queries, kept + queries), bool)
        allowed[:, kept : kept + key_from - query_from] = False  # a column before the block is seen as it was cached
        positions = torch.arange(query_from, query_to)[None]
        return self.model(
            row[None, query_from:query_to],
            attention_mask=bias_of(allowed),
            position_ids=positions,
            past_key_values=past,
        ).logits[0]
