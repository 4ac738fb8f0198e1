"""Every family from end to end: convert, three steps of training, generate, adapter in real peft, merged checkpoint in
transformers. `DIFFLM_FAMILIES_TABLE=docs/families.md` puts the figures that were seen into the table of that page."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import difflm_jax
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.objective import loss_sums
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.models.weights import projections_of
from tests.byte_tokenizer import byte_tokenizer
from tests.families import FAMILIES, torch_model

STEPS = 3
SEEN: dict[str, dict[str, str]] = {}  # family -> column -> what was seen


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    if path := os.environ.get("DIFFLM_FAMILIES_TABLE"):
        page = Path(path).read_text(encoding="utf-8")
        Path(path).write_text("\n".join(map(with_figures, page.split("\n"))), encoding="utf-8")


def with_figures(line: str) -> str:
    """A line of the page; if it is the row of a family that was run, with what was seen."""
    cells = line.split("|")
    name = cells[1].strip().strip("`") if len(cells) == 8 else ""
    seen = [SEEN.get(name, {}).get(column) for column in ("causal", "peft", "merge")]
    if None in seen:
        return line
    cells[2:5] = [f" {figure} " for figure in seen]
    return "|".join(cells)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(its name, a directory that transformers wrote, its model there)."""
    directory, tokenizer = tmp_path_factory.mktemp(request.param), byte_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = torch_model(request.param, **{**FAMILIES[request.param], "vocab_size": 264, **ids})
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    SEEN[request.param] = {}
    return request.param, directory, model


@pytest.fixture(scope="module")
def lm(family):
    """Ours, with a fresh adapter on all that it can adapt."""
    _, directory, _ = family
    lm = difflm_jax.load(directory, attention="prefix", dtype="float32")
    config = LoraConfig(r=2, lora_alpha=3, routed_experts=lm.config.experts is not None)
    config = config.of_model(projections_of(lm.config))
    lora = init_lora(jax.random.key(0), lm.params, config, lm.params["embed_tokens"]["weight"].mean(axis=0))
    return lm.with_adapter(lora, config)


TOKENS = np.random.default_rng(0).integers(3, 250, (2, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def trained(family, lm):
    """The same after three steps; its loss has fallen."""
    prompts, lengths = np.array([4, 6], np.int32), np.array([16, 12], np.int32)
    answer = (np.arange(16) >= prompts[:, None]) & (np.arange(16) < lengths[:, None])
    fields = (TOKENS, lengths, answer, prompts, np.arange(2, dtype=np.int32), np.arange(2) / 2)
    batch = CleanBatch.of_rows(*map(jnp.asarray, fields))
    corruption = Corruption(lm.diffusion)
    optimizer = optax.adam(0.02)

    @jax.jit
    def steps(lora):
        def loss(lora):
            variables = {"params": lm.params, "lora": lora}
            return loss_sums(lm.model, variables, batch, jax.random.key(1), corruption, 16, True)[0]

        def step(carry, _):
            lora, state = carry
            value, gradient = jax.value_and_grad(loss)(lora)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(lora, updates), state), value

        (lora, _), losses = jax.lax.scan(step, (lora, optimizer.init(lora)), length=STEPS + 1)
        return lora, losses

    lora, losses = steps(lm.lora)
    assert losses[-1] < losses[0]
    assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in jax.tree.leaves(lora))
    return lm.with_adapter(lora, lm.model.lora)


def error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def logits_of(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


def without_update(lm) -> dict:
    """Its adapter at zero, with the row that the base has for the mask."""
    row = lm.params["embed_tokens"]["weight"][lm.mask_token_id].astype(jnp.float32)
    return {**jax.tree.map(jnp.zeros_like, lm.lora), "mask_row": row}


def test_peft_and_a_merged_checkpoint_give_our_logits_after_training(family, trained, tmp_path):
    name, directory, model = family
    masked = np.where(TOKENS % 3 == 0, trained.mask_token_id, TOKENS)
    trained.save_adapter(tmp_path / "adapter")
    of_adapter = difflm_jax.load(directory, adapter=tmp_path / "adapter", causal=True, dtype="float32")
    base = of_adapter.with_adapter(without_update(of_adapter), of_adapter.model.lora)  # one program for both
    found = SEEN[name]["causal"] = f"{error(base(TOKENS), logits_of(model, TOKENS)):.0e}"
    assert float(found) <= 1e-4
    ours = of_adapter(masked)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter").eval()
    SEEN[name]["peft"] = f"{error(ours, logits_of(adapted, masked)):.0e}"
    assert error(ours, logits_of(adapted, masked)) <= 1e-5

    trained.merge().save_pretrained(tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    SEEN[name]["merge"] = f"{error(ours, logits_of(merged.eval(), masked)):.0e}"
    assert error(ours, logits_of(merged.eval(), masked)) <= 1e-5


@pytest.mark.parametrize(
    "family", ["gemma2", "gemma3_text", "gemma4_text", "granite_swa", "phi3", "olmo3", "gpt_oss"], indirect=True
)
def test_generation_with_a_cache_is_that_without(family, lm):
    """Windows, sinks, caps and layers without RoPE, in rows that are longer than a window."""
    text = {"max_new_tokens": 12, "steps": 6, "seed": 0}
    prompts = [TOKENS[0, :12].tolist(), TOKENS[1, :3].tolist()]
    cached, plain = (lm.generate(prompts, cache=cache, **text).tokens for cache in ("auto", "none"))
    assert [row.tolist() for row in cached] == [row.tolist() for row in plain]
