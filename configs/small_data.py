"""A few hundred rows of your own on a small model: the data is the only argument.

Command:   difflm train --config=configs/small_data.py --config.dataset=mine.jsonl
           Look first: the same with --preview. Another model: --config.model=DIR_OR_HUB_ID
           A directory of your own with this recipe in it: difflm init DIR --data=mine.jsonl
Hardware:  2 CPU cores; a step holds about 8 short rows.
Expect:    10 + 240 steps (40 epochs, if these are fewer: 160 steps for 60 short rows), then an adapter in
           runs/small_data/sft_model. Learning rate and decoding are the quickstart's, whose 10 + 160 steps of half the
           length take minutes (docs/quickstart.md).

Rows share one copy of what their prompts have in common, several examples a row; weights count masks beside visible
tokens most; a few held-out rows are scored and two are answered at each evaluation; nothing goes to Weights & Biases.
"""

from ml_collections import ConfigDict

from difflm_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.output_dir = "runs/small_data"
    config.dtype = "auto"
    config.remat = "save_dots"

    config.attention = "prefix"
    config.logit_shift = True
    config.mask_rate = "row"
    config.min_mask_probability = 0.3
    config.max_mask_probability = 1.0
    config.loss_tokens = "masked"
    config.loss_weight = "context"
    config.loss_chunk = 128
    config.algorithm = "steady"

    config.batching = "shared"
    config.max_length = 512
    config.batch_size = 1
    config.mesh.data = 1
    config.gradient_accumulation_steps = 1
    config.length_multiple = 8
    config.answer_padding = 16
    config.test_size = 0.1

    config.epochs = 40
    config.pretrain.max_steps = 10
    config.sft.max_steps = 240
    config.learning_rate = 1e-3
    config.lora_config.lora_dropout = 0.0

    config.log_interval = 5
    config.log_frequency_per_epoch = 1
    config.eval_rows = 32
    config.sample_prompts = 2
    config.sample_tokens = 32
    config.diffusion_steps = 16
    config.wandb_config.project = ""
    return config
