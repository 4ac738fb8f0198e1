"""LLaDA 2 (arXiv:2512.15745), LLaDA-MoE (arXiv:2509.24389) and SDAR-MoE written out in torch, one row at a time.

Tensors have the names of their checkpoints. LLaDA 2 joins q, k and v, rotates the first half of a head, chooses experts
by sigmoid scores plus a bias within the best groups, and adds an expert that every token has. The others are Qwen3 with
a softmax router.
"""

from typing import Any

import torch

D, F, W, H, K, E, V, X = 32, 48, 16, 4, 2, 8, 264, 8  # hidden, dense, expert width, heads, kv heads, head, ids, experts


class Mixture:
    """The decoder of a `config.json`, with random weights in `tensors`."""

    def __init__(self, config: dict[str, Any]):
        self.config, self.is_llada2 = config, config["model_type"] == "llada2_moe"
        random = torch.Generator().manual_seed(len(config))
        self.tensors: dict[str, torch.Tensor] = {}
        self._make = lambda name, *shape, centre=0.0: self.tensors.update(
            {name: centre + 0.3 * torch.randn(*shape, generator=random)}
        )
        self._make("model.word_embeddings.weight" if self.is_llada2 else "model.embed_tokens.weight", V, D)
        self._make("model.norm.weight", D, centre=1.0)
        self._make("lm_head.weight", V, D)
        for layer in range(config["num_hidden_layers"]):
            self._layer(f"model.layers.{layer}.", layer)

    def _sparse(self, layer: int) -> bool:
        if self.is_llada2:
            return layer >= self.config["first_k_dense_replace"]
        return bool(self.config.get("moe_layer_freq", [1] * 9)[layer])

    def _layer(self, at: str, layer: int) -> None:
        for name in ("input_layernorm", "post_attention_layernorm"):
            self._make(f"{at}{name}.weight", D, centre=1.0)
        if self.is_llada2:
            self._make(f"{at}attention.query_key_value.weight", (H + 2 * K) * E, D)
            self._make(f"{at}attention.dense.weight", D, H * E)
            norms = ("attention.query_layernorm", "attention.key_layernorm")
        else:
            for name, heads in (("q", H), ("k", K), ("v", K)):
                self._make(f"{at}self_attn.{name}_proj.weight", heads * E, D)
            self._make(f"{at}self_attn.o_proj.weight", D, H * E)
            norms = ("self_attn.q_norm", "self_attn.k_norm")
        for name in norms:
            self._make(f"{at}{name}.weight", E, centre=1.0)
        if not self._sparse(layer):
            return self._mlp(f"{at}mlp.", F)
        self._make(f"{at}mlp.gate.weight", X, D)
        for expert in range(X):
            self._mlp(f"{at}mlp.experts.{expert}.", W)
        if self.is_llada2:
            self._make(f"{at}mlp.gate.expert_bias", X)
            self._mlp(f"{at}mlp.shared_experts.", W * self.config["num_shared_experts"])

    def _mlp(self, at: str, width: int) -> None:
        for name, shape in (("gate", (width, D)), ("up", (width, D)), ("down", (D, width))):
            self._make(f"{at}{name}_proj.weight", *shape)

    def __call__(self, tokens: torch.Tensor, block: int) -> torch.Tensor:
        """Logits [L, V] of tokens [L]; a token sees its block, counted from the first token, and those before it."""
        index = torch.arange(len(tokens))
        seen = index[None, :] // block <= index[:, None] // block if block else torch.ones(len(tokens), len(tokens))
        x = self.tensors["model.word_embeddings.weight" if self.is_llada2 else "model.embed_tokens.weight"][tokens]
        rotated = int(E * self.config.get("partial_rotary_factor", 1.0))
        angle = index[:, None] * self.config["rope_theta"] ** (-torch.arange(0, rotated, 2) / rotated)
        self._cos, self._sin = (torch.cat([f(angle)] * 2, dim=-1)[:, None] for f in (torch.cos, torch.sin))
        for layer in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            x = x + self._attend(self._norm(x, f"{at}input_layernorm"), at, seen.bool())
            h = self._norm(x, f"{at}post_attention_layernorm")
            x = x + (self._mixture(h, f"{at}mlp.") if self._sparse(layer) else self._dense(h, f"{at}mlp."))
        return self._norm(x, "model.norm") @ self.tensors["lm_head.weight"].T

    def _attend(self, h: torch.Tensor, at: str, seen: torch.Tensor) -> torch.Tensor:
        t = self.tensors
        if self.is_llada2:
            q, k, v = (h @ t[f"{at}attention.query_key_value.weight"].T).view(len(h), -1, E).split([H, K, K], dim=1)
            norms, out = ("attention.query_layernorm", "attention.key_layernorm"), "attention.dense"
        else:
            q, k, v = ((h @ t[f"{at}self_attn.{name}_proj.weight"].T).view(len(h), -1, E) for name in "qkv")
            norms, out = ("self_attn.q_norm", "self_attn.k_norm"), "self_attn.o_proj"
        q, k = (self._rotate(self._norm(x, at + name)) for x, name in zip((q, k), norms, strict=True))
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q, k) / E**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        return torch.einsum("hqk,khe->qhe", weights, v).flatten(1) @ t[f"{at}{out}.weight"].T

    def _mixture(self, h: torch.Tensor, at: str) -> torch.Tensor:
        scores = h @ self.tensors[f"{at}gate.weight"].T
        scores = scores.sigmoid() if self.is_llada2 else scores.softmax(-1)
        y = torch.zeros_like(h)
        for row, own in enumerate(scores):
            chosen = self._chosen(own, at)
            weights = own[chosen]
            if self.is_llada2:
                weights = self.config["routed_scaling_factor"] * weights / weights.sum()
            elif self.config.get("norm_topk_prob"):
                weights = weights / weights.sum()
            for weight, expert in zip(weights, chosen.tolist(), strict=True):
                y[row] += weight * self._dense(h[row], f"{at}experts.{expert}.")
        return y + self._dense(h, f"{at}shared_experts.") if self.is_llada2 else y

    def _chosen(self, scores: torch.Tensor, at: str) -> torch.Tensor:
        count = self.config["num_experts_per_tok"]
        if not self.is_llada2:
            return scores.topk(count).indices
        by_group = (scores + self.tensors[f"{at}gate.expert_bias"]).view(self.config["n_group"], -1)
        best = by_group.topk(2, dim=1).values.sum(1).topk(self.config["topk_group"]).indices
        kept = torch.full_like(by_group, -torch.inf)
        kept[best] = by_group[best]
        return kept.flatten().topk(count).indices

    def _dense(self, h: torch.Tensor, at: str) -> torch.Tensor:
        gate, up, down = (self.tensors[f"{at}{name}_proj.weight"].T for name in ("gate", "up", "down"))
        return (torch.nn.functional.silu(h @ gate) * (h @ up)) @ down

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        width = self._cos.shape[-1]
        turned, rest = x[..., :width], x[..., width:]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * self._cos + torch.cat([-second, first], dim=-1) * self._sin
        return torch.cat([turned, rest], dim=-1)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        squares = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(squares + self.config["rms_norm_eps"]) * self.tensors[f"{name}.weight"]
