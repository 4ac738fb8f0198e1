"""The quickstart's second act: SmolLM2-135M-Instruct writes its own text in fewer forward passes, on two CPU cores.

Command:   bash scripts/quickstart.sh --config=configs/quickstart_lossless.py
Hardware:  2 CPU cores without an accelerator, 3 GB of memory; not timed on an idle machine.
Expect:    the base answers all prompts of the built-in rows, an adapter learns to draft these answers, and three
           held-out questions are answered by the base and with drafts: the same text, and the passes of both.
"""

from ml_collections import ConfigDict

from difflm_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.dataset = "builtin:quickstart"
    config.output_dir = "runs/quickstart_lossless"
    config.dtype = "float32"  # in bfloat16 the two texts are equal up to ties
    config.objective = "draft"
    config.phases = ("sft",)
    config.train_mask_row = False
    config.lora_config.lora_dropout = 0.0
    config.test_size = 0.05
    config.draft.prompts = 0
    config.draft.answer_tokens = 64
    config.draft.anchors = 12

    config.max_length = 128
    config.length_multiple = 128
    config.batching = "grouped"
    config.batch_size = 4
    config.gradient_accumulation_steps = 1
    config.epochs = 2
    config.sft.max_steps = 120
    config.learning_rate = 2e-3
    config.lr_schedule = "linear"
    config.warmup_steps = 10

    config.remat = "none"  # noise rows are few
    config.log_interval = 10
    config.log_frequency_per_epoch = 1
    config.sample_prompts = 2
    config.wandb_config.project = ""
    config.report.data = "builtin:quickstart_heldout"
    config.report.rows = 3
    config.report.max_new_tokens = 64
    return config
