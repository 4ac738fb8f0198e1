"""The field's decoding rules in plain torch, float64, one row at a time: what the jitted sampler must equal.

A denoiser here is a function (tokens [L] of a row) -> logits [L, V]; caches are functions of their own.
"""

import math
from collections.abc import Callable

import torch

Denoise = Callable[[torch.Tensor], torch.Tensor]


def llada_quota(masks: int, steps: int) -> list[int]:
    """LLaDA's `get_num_transfer_tokens`: n // S each, plus one in the first n mod S steps."""
    return [masks // steps + int(i < masks % steps) for i in range(steps)]


def dllm_quota(masks: int, steps: int) -> list[int]:
    """dLLM: round(remaining * (1 - (1 - a_s) / (1 - a_t))) with a_t = 1 - t, zero steps dropped."""
    found = []
    for i in range(steps):
        t, s = (steps - i) / steps, (steps - i - 1) / steps
        found.append(round(masks * (1 - (1 - (1 - s)) / (1 - (1 - t)))))
        masks -= found[-1]
    return [k for k in found if k]


def dream_times(steps: int) -> torch.Tensor:
    return torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)


def forbid(logits: torch.Tensor, mask_id: int) -> torch.Tensor:
    logits = logits.double().clone()
    logits[..., mask_id] = -torch.inf
    return logits


def score(algorithm: str, logits: torch.Tensor) -> torch.Tensor:
    """[L] confidence of the argmax under each published rule."""
    p = torch.softmax(logits, -1)
    top = p.sort(-1, descending=True).values
    return {
        "confidence": logits.max(-1).values,
        "probability": top[:, 0],
        "maskgit_plus": top[:, 0],
        "topk_margin": top[:, 0] - top[:, 1],
        "entropy": (p * torch.log(p.clamp_min(1e-300))).sum(-1),
    }[algorithm]


def best(confidence: torch.Tensor, allowed: torch.Tensor, k: int) -> list[int]:
    """The k allowed positions of largest confidence, the leftmost of equals first."""
    places = [i for i in range(len(confidence)) if allowed[i]]
    return sorted(places, key=lambda i: (-confidence[i].item(), i))[:k]


def llada(denoise: Denoise, row, prompt: int, block: int, steps: int, mask_id: int, algorithm="probability"):
    """LLaDA `generate` at temperature 0: blocks from left to right, the quota of each step, nothing ever changed."""
    row, passes = row.clone(), 0
    blocks = (len(row) - prompt) // block
    for b in range(blocks):
        first, end = prompt + b * block, prompt + (b + 1) * block
        for k in llada_quota(int((row[first:end] == mask_id).sum()), steps // blocks):
            if k == 0:
                continue  # nothing could be committed: a forward pass that is not needed
            logits = forbid(denoise(row), mask_id)
            allowed = row == mask_id
            allowed[end:] = False
            for i in best(score(algorithm, logits), allowed, k):
                row[i] = logits[i].argmax()
            passes += 1
    return row, passes


def dream(denoise: Denoise, row, prompt: int, steps: int, mask_id: int, algorithm: str, top_p=None, top_k=None):
    """Dream `diffusion_generate` at temperature 0, with the number of masks of the row itself."""
    row, passes = row.clone(), 0
    times = dream_times(steps)
    for i in range(steps):
        allowed = row == mask_id
        masks = int(allowed.sum())
        if not masks:
            break
        logits = filtered(forbid(denoise(row), mask_id), top_p, top_k)
        k = int(masks * (1 - times[i + 1] / times[i])) if i < steps - 1 else masks
        for at in best(score(algorithm, logits), allowed, k):
            row[at] = logits[at].argmax()
        passes += 1
    return row, passes


def filtered(logits: torch.Tensor, top_p: float | None, top_k: int | None) -> torch.Tensor:
    """Dream's `top_p_logits`, then its `top_k_logits`."""
    logits = logits.clone()
    if top_p is not None:
        for i in range(len(logits)):
            order = logits[i].argsort(descending=True, stable=True)
            total = torch.softmax(logits[i][order], -1).cumsum(-1)
            dropped = total > top_p
            dropped = torch.cat([torch.tensor([False]), dropped[:-1]])
            logits[i, order[dropped]] = -torch.inf
    if top_k is not None:
        kth = logits.topk(top_k, -1).values[:, -1:]
        logits[logits < kth] = -torch.inf
    return logits


def threshold_rule(confidence, allowed, tau: float) -> list[int]:
    """Fast-dLLM: all of at least tau, the best in any case."""
    places = best(confidence, allowed, len(confidence))
    return [i for rank, i in enumerate(places) if rank == 0 or confidence[i] >= tau]


def factor_rule(confidence, allowed, factor: float) -> list[int]:
    """Fast-dLLM: ranks r = 1, 2, ... while confidence_r >= 1 - f / (r + 1), the first in any case."""
    taken = []
    for rank, i in enumerate(best(confidence, allowed, len(confidence)), start=1):
        if rank > 1 and confidence[i] < 1 - factor / (rank + 1):
            break
        taken.append(i)
    return taken


def entropy_rule(negative_entropy, allowed, bound: float) -> list[int]:
    """EB-Sampler: in order of entropy while cumsum(H) - H <= bound."""
    taken, total = [], 0.0
    for i in best(negative_entropy, allowed, len(negative_entropy)):
        if total > bound:
            break
        taken.append(i)
        total += -negative_entropy[i].item()
    return taken


def fast_dllm(denoise, row, prompt: int, block: int, mask_id: int, rule, algorithm="probability"):
    """Fast-dLLM `generate` with a variable rule (confidence, allowed) -> positions, without a cache.

    `denoise` may also be a cache: an object with `start(row, first, end) -> logits` for the first pass of a block and
    `again(row, first, end) -> logits` for the others.
    """
    row, passes = row.clone(), 0
    for first in range(prompt, len(row), block):
        end = first + block
        opening = True
        while (row[first:end] == mask_id).any():
            if callable(denoise):
                logits = denoise(row)
            else:
                logits = (denoise.start if opening else denoise.again)(row, first, end)
            logits = forbid(logits, mask_id)
            allowed = row == mask_id
            allowed[end:] = False
            for i in rule(score(algorithm, logits), allowed):
                row[i] = logits[i].argmax()
            passes += 1
            opening = False
    return row, passes


def llada21(denoise, row, prompt: int, block: int, mask_id: int, tau: float, edit_tau: float, max_post: int):
    """LLaDA2.1 at temperature 0: masks above tau (the best in any case), and tokens replaced above edit_tau."""
    row, passes = row.clone(), 0
    for first in range(prompt, len(row), block):
        end = first + block
        given = row[first:end] != mask_id
        if given.all():
            continue
        post = 0
        while True:
            active = row[first:end] == mask_id
            post += int(not active.any())
            if post > max_post:
                break
            logits = forbid(denoise(row), mask_id)[first:end]
            p, tokens = torch.softmax(logits, -1).max(-1)
            taken = threshold_rule(p, active, tau) if active.any() else []
            edits = ~active & ~given & (p > edit_tau) & (tokens != row[first:end])
            for i in [*taken, *edits.nonzero()[:, 0].tolist()]:
                row[first + i] = tokens[i]
            passes += 1
            if not active.any() and not edits.any():
                break
    return row, passes


def remdm_rates(strategy: str, eta: float, alpha_t: float, alpha_s: float, confidence=None):
    """(σ, probability of unmasking) of ReMDM; for "conf" σ over the tokens whose confidences are given."""
    most = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
    if strategy == "cap":
        sigma = min(eta, most)
    elif strategy == "rescale":
        sigma = eta * most
    else:
        weights = [math.exp(-c) for c in confidence]
        return [most * w / sum(weights) for w in weights], (alpha_s - alpha_t) / (1 - alpha_t)
    return sigma, (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
