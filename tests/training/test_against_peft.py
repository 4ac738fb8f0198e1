"""Thirty steps of training on the same batches, masks and initial factors as torch + peft + AdamW (+ bitsandbytes)."""

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, get_linear_schedule_with_warmup

from difflm_jax.checkpoint.hf import load_params, save_pretrained
from difflm_jax.checkpoint.peft_modules import peft_modules
from difflm_jax.checkpoint.source import open_source
from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import CleanBatch, Corruption, corrupt
from difflm_jax.diffusion.weights import LossRule
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.models.transformer import Transformer
from difflm_jax.quant import QuantConfig
from difflm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from difflm_jax.training.step import StepOptions, TrainState, make_train_step
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny import HF, params_from_state_dict

STEPS, ROWS, LENGTH, MASK = 30, 8, 24, 96
LORA = LoraConfig(r=4, lora_alpha=8)
SETTINGS = ConfigDict(
    {
        "learning_rate": 5e-3,
        "lr_schedule": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.01,
        "adam_b1": 0.9,
        "adam_b2": 0.999,
        "adam_eps": 1e-8,
        "max_grad_norm": 1.0,
    }
)
RULES = {
    "original-pretrain": Corruption(DiffusionConfig(mask_token_id=MASK)),
    "original-sft": Corruption(DiffusionConfig(mask_token_id=MASK), scope="answer"),
    "mdlm-prefix-shift": Corruption(
        DiffusionConfig("prefix", logit_shift=True, mask_token_id=MASK),
        scope="answer",
        mask_rate="row",
        loss=LossRule("masked", "inverse_rate"),
    ),
    "bd3lm": Corruption(
        DiffusionConfig("block", 4, mask_token_id=MASK),
        scope="answer",
        mask_rate="block",
        loss=LossRule("masked", "inverse_rate"),
    ),
}


def batches():
    """STEPS batches [1, ROWS, LENGTH] of copies of a few sentences, so that there is something to learn."""
    rng = np.random.default_rng(0)
    sentences = rng.integers(0, 90, (5, LENGTH))
    for step in range(STEPS):
        lengths = rng.integers(14, LENGTH + 1, ROWS).astype(np.int32)
        prompts = rng.integers(2, 8, ROWS).astype(np.int32)
        tokens = sentences[rng.integers(0, 5, ROWS)].astype(np.int32)
        position = np.arange(LENGTH)
        answer = (position >= prompts[:, None]) & (position < lengths[:, None])
        ids = np.arange(ROWS, dtype=np.int32) + step * ROWS
        strata = np.arange(ROWS) / ROWS
        yield CleanBatch.of_rows(*(field[None] for field in (tokens, lengths, answer, prompts, ids, strata)))


def torch_loss(model, batch, noisy, rule):
    """Σ weight * CE / Σ weight with the mask token shut out of the softmax, straight from the definition."""
    tokens, valid = np.array(noisy.tokens), np.array(batch.segments[0] > 0)
    prompts = np.asarray(noisy.prompt_lengths)[:, 0]
    position = np.arange(LENGTH)
    allowed = np.broadcast_to(valid[:, None, :], (ROWS, LENGTH, LENGTH)).copy()
    if rule.diffusion.attention == "prefix":
        in_answer = position >= prompts[:, None]
        allowed &= (position[None, :] <= position[:, None])[None] | in_answer[:, :, None]
    inputs, positions = torch.tensor(tokens).long(), torch.arange(LENGTH).tile(ROWS, 1)
    if rule.diffusion.attention == "block":
        allowed = bd3lm_mask(valid, prompts, rule.diffusion.block_length)
        inputs = torch.cat([inputs, torch.tensor(np.array(batch.tokens[0])).long()], dim=1)
        positions = positions.tile(1, 2)
    bias = torch.where(torch.tensor(allowed)[:, None], 0.0, torch.finfo(torch.float32).min)
    logits = model(inputs, attention_mask=bias, position_ids=positions, use_cache=False).logits[:, :LENGTH]
    logits = logits.index_fill(2, torch.tensor([MASK]), -torch.inf)
    if rule.diffusion.logit_shift:
        logits = torch.roll(logits, 1, dims=1)
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(np.array(batch.tokens[0])).long().flatten(), reduction="none"
    )
    weights = torch.tensor(np.array(noisy.weights)).flatten()
    return torch.where(weights > 0, weights * nll, 0.0).sum() / weights.sum()


def bd3lm_mask(valid, prompts, block):
    """[x_t; x_0]: same block and half, or x_t to x_0 of earlier blocks, or x_0 to x_0 of no later ones; a prompt token
    is a block of its own."""
    allowed = np.zeros((ROWS, 2 * LENGTH, 2 * LENGTH), bool)
    for row in range(ROWS):
        prompt = prompts[row]
        number = np.array([i if i < prompt else prompt + (i - prompt) // block for i in range(LENGTH)])
        for q in range(2 * LENGTH):
            for k in range(2 * LENGTH):
                noisy_q, noisy_k = q < LENGTH, k < LENGTH
                block_q, block_k = number[q % LENGTH], number[k % LENGTH]
                seen = (
                    (block_q == block_k and noisy_q == noisy_k)
                    or (noisy_q and not noisy_k and block_q > block_k)
                    or (not noisy_q and not noisy_k and block_q >= block_k)
                )
                allowed[row, q, k] = seen and valid[row, k % LENGTH]
    return allowed


def random_model(**changes):
    """A random Qwen3 in float32 whose parameters all matter."""
    torch.manual_seed(0)
    hf_config = Qwen3Config(**{key: value for key, value in {**HF, **changes}.items() if key != "model_type"})
    base = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return base


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_thirty_steps_follow_torch_and_peft(rule):
    base = random_model()
    config = ModelConfig.from_hf(base.config.to_dict())
    params = params_from_state_dict(config, {k: v.detach().numpy() for k, v in base.state_dict().items()})
    check_thirty_steps(base, config, params, rule, loss_tolerance=1e-3, factor_tolerance=2e-3)


def test_thirty_steps_over_nf4_follow_torch_peft_and_bitsandbytes(tmp_path):
    """The base of both is the same 4-bit checkpoint, with double quantisation."""
    random_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    dense = open_source(str(tmp_path / "dense"))
    params = load_params(dense, jnp.float32, QuantConfig("nf4"))
    save_pretrained(
        tmp_path / "nf4", params, dense.config, dense.hf_config, dense.load_tokenizer(), "", {"attention": "full"}
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", attn_implementation="eager", dtype=torch.float32)
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):  # in float32, not in what the CPU is fastest at
            module.support_avx512bf16_for_cpu, module.compute_dtype = False, torch.float32
    rule = RULES["mdlm-prefix-shift"]
    check_thirty_steps(base, dense.config, params, rule, loss_tolerance=5e-3, factor_tolerance=1e-2)


def check_thirty_steps(base, config, params, rule, loss_tolerance, factor_tolerance):
    """Trains `base` by torch and `params` by us from the same factors, and compares losses and factors."""
    lora = init_lora(jax.random.key(1), params, LORA, params["embed_tokens"]["weight"].mean(axis=0))

    peft_config = PeftConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(LORA.target_modules),
        trainable_token_indices={"embed_tokens": [MASK]},
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(base, peft_config)
    named = dict(peft_model.named_parameters())
    pairs = {}  # torch parameter -> how to find ours
    modules = {module.name: module for module in peft_modules(config)}
    with torch.no_grad():
        for block in ("self_attn", "mlp"):
            for name in lora["layers"][block]:
                for factor in ("lora_A", "lora_B"):
                    for layer in range(config.num_layers):
                        key = modules[name].key(factor, layer).replace(".weight", ".default.weight")
                        named[key].copy_(torch.tensor(np.array(lora["layers"][block][name][factor][layer])))
                        pairs[key] = (block, name, factor, layer)
        (row_key,) = [key for key in named if "trainable_tokens_delta" in key and "embed_tokens" in key]
        named[row_key].copy_(torch.tensor(np.array(lora["mask_row"]))[None])
    model = Transformer(config, lora=LORA, mask_token_id=MASK, remat="full")
    losses, expected, trained = side_by_side(peft_model, model, {"params": params}, {"lora": lora}, rule)
    assert min(expected[-3:]) < expected[0] - 0.3  # it did learn: agreeing on nothing would be no test
    np.testing.assert_allclose(losses, expected, atol=loss_tolerance)
    for torch_key, (block, name, factor, layer) in pairs.items():
        ours = np.asarray(trained["lora"]["layers"][block][name][factor][layer])
        np.testing.assert_allclose(ours, named[torch_key].detach().numpy(), atol=factor_tolerance)
    found = np.asarray(trained["lora"]["mask_row"])
    np.testing.assert_allclose(found, named[row_key].detach().numpy()[0], atol=factor_tolerance)


def side_by_side(torch_model, model, frozen, trained, rule):
    """(our losses, torch's losses, what we trained) of thirty AdamW steps on the same batches and masks."""
    parameters = [parameter for parameter in torch_model.parameters() if parameter.requires_grad]
    torch_optimizer = torch.optim.AdamW(parameters, lr=SETTINGS.learning_rate, weight_decay=0.01)
    torch_schedule = get_linear_schedule_with_warmup(torch_optimizer, 0, STEPS)
    optimizer, schedule = make_optimizer(SETTINGS), learning_rate_schedule(SETTINGS, STEPS)
    step = make_train_step(StepOptions(model, rule, 16), optimizer, schedule, make_mesh(1))
    state = TrainState(jax.tree.map(jnp.copy, trained), optimizer.init(trained))
    key = jax.random.key(3)
    losses, expected = [], []
    for index, batch in enumerate(batches()):
        noisy = corrupt(jax.random.fold_in(key, index), jax.tree.map(lambda x: jnp.asarray(x[0]), batch), rule)
        loss = torch_loss(torch_model, batch, noisy, rule)
        torch_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        torch_optimizer.step()
        torch_schedule.step()
        expected.append(loss.item())
        state, metrics = step(frozen, state, batch, key, index)
        losses.append(float(metrics["sums"].loss / metrics["sums"].weight))
    return losses, expected, state.trained
