"""FLOPs per token against torch's count of a real LoRA step, and the table of peaks."""

import peft
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from difflm_jax.models.config import ModelConfig
from difflm_jax.models.flops import Work, mfu, peak_flops, train_flops, train_flops_per_token
from difflm_jax.models.lora import LoraConfig

_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _count_with_torch(hf_config, lora: LoraConfig, length: int) -> float:
    """Counts the matmul FLOPs per token of one forward and backward pass with peft, input embeddings trained."""
    model = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager")
    model.enable_input_require_grads()  # our mask row is trained, so gradients reach the embeddings
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=lora.r, lora_alpha=16, target_modules=list(lora.target_modules))
    )
    tokens = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.logsumexp(-1).sum().backward()
    return counter.get_total_flops() / length


@pytest.mark.parametrize("target_modules", [_ALL, ("q_proj", "v_proj")])
@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("llama", False)])
def test_the_formula_is_what_torch_counts(family, tied, target_modules):
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 64,
    }
    lora = LoraConfig(r=4, target_modules=target_modules)
    expected = _count_with_torch(transformers.AutoConfig.for_model(family, **settings), lora, length=24)
    config = ModelConfig.from_hf({"model_type": family, **settings})
    assert train_flops_per_token(config, 24, lora) == pytest.approx(expected, rel=1e-9)


def test_remat_adds_one_forward_pass_of_the_layers():
    config = ModelConfig.from_hf(
        {
            "model_type": "qwen3",
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "max_position_embeddings": 64,
        }
    )
    lora = LoraConfig(r=4, target_modules=("q_proj",))
    forward = 2 * 3 * (4 * 32 * 32 + 3 * 32 * 48) + 2 * 3 * 4 * (32 + 32) + 4 * 3 * 32 * 10
    plain, remat = (train_flops(config, lora, Work(1, 10, 1), name) for name in ("none", "full"))
    assert remat - plain == forward


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v4", 275e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v6 lite", 918e12),
        ("TPU v4 lite", 138e12),
        ("cpu", None),
        ("NVIDIA L400", None),
    ],
)
def test_peaks_by_device_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_mfu_is_a_share_of_all_devices_and_null_where_unknown():
    assert mfu(989e12, "NVIDIA H100 80GB HBM3", 4) == pytest.approx(0.25)
    assert mfu(1e12, "cpu", 1) is None
