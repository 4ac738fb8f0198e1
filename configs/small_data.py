"""A few hundred rows of your own on a small model: the data is the only argument.

Command:   difflm train --config=configs/small_data.py --config.dataset=mine.jsonl
           Look first: the same with --preview. Another model: --config.model=DIR_OR_HUB_ID
           A directory of your own with this recipe in it: difflm init DIR --data=mine.jsonl
Hardware:  2 CPU cores; a step holds about 8 rows.
Expect:    20 epochs, at most 240 steps (140 for 60 short rows), then an adapter in runs/small_data/sft_model. The first
           lines show the time to go: --config.max_steps=100 ends sooner. docs/recipes.md has the scores of 60 rows.

Rows share one copy of the beginning that their prompts have in common. The learning rate is high, because the steps are
few. Held-out rows are scored and two are answered every 60 steps. Nothing goes to Weights & Biases.
"""

from ml_collections import ConfigDict

from difflm_jax.config import recommended_config


def get_config() -> ConfigDict:
    config = recommended_config()
    config.model = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.output_dir = "runs/small_data"
    config.dtype = "auto"
    config.remat = "save_dots"

    config.loss_chunk = 128

    config.batching = "shared"
    config.max_length = 512
    config.row_examples = 8  # 60 short rows: steps of 8, not all of them in four; Adam gains from more steps
    config.batch_size = 1
    config.mesh.data = 1
    config.gradient_accumulation_steps = 1
    config.length_multiple = 8
    config.answer_padding = 16
    config.test_size = 0.1

    config.phases = ("sft",)
    config.epochs = 20
    config.max_steps = 240
    config.learning_rate = 2e-3
    config.warmup_steps = 5
    config.lora_config.lora_dropout = 0.0

    config.log_interval = 5
    config.eval_interval = 60
    config.eval_rows = 32
    config.sample_prompts = 2
    config.sample_tokens = 32
    config.diffusion_steps = 16
    config.wandb_config.project = ""
    return config
