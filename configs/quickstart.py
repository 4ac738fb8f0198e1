"""Quickstart."""

from ml_collections import ConfigDict

from difflm_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.dataset = "builtin:quickstart"
    config.output_dir = "runs/quickstart"
    config.dtype = "float32"
    config.remat = "full"
    config.attention = "prefix"
    config.logit_shift = True
    config.mask_rate = "row"
    config.min_mask_probability = 0.3
    config.max_mask_probability = 1.0
    config.loss_tokens = "masked"
    config.loss_chunk = 128
    config.batch_size = 8
    config.gradient_accumulation_steps = 1
    config.learning_rate = 1e-3
    config.lora_config.lora_dropout = 0.0
    config.pretrain.max_steps = 10
    config.sft.max_steps = 110
    config.epochs = 4
    config.test_size = 0.05
    config.max_length = 96
    config.length_multiple = 16
    config.answer_padding = 16
    config.log_interval = 5
    config.log_frequency_per_epoch = 1
    config.sample_prompts = 4
    config.sample_tokens = 16
    config.diffusion_steps = 8
    config.algorithm = "probability"
    config.wandb_config.project = ""
    config.report.data = "builtin:quickstart_heldout"
    config.report.max_new_tokens = 16
    return config
