"""An adapter that drafts for its base: the text is the base's own, in fewer forward passes (docs/lossless.md).

Command:   python -m difflm_jax.train --config=configs/lossless.py --config.model=MODEL --config.dataset=FILE
Hardware:  as configs/sft.py; the base may be quantised.
Expect:    the base first answers draft.prompts prompts greedily; then noise rows learn to draft them. The run leaves a
           plain PEFT adapter in /tmp/output/lossless/sft_model, which generate uses with algorithm=speculative.
           metrics.jsonl reports eval_accepted and eval_tokens_per_cycle of the test split.

More prompts are worth more than more steps: 160 prompts overfit within 400 steps of 128 noise rows.
"""

from difflm_jax.config import default_config


def get_config():
    config = default_config()
    config.objective = "draft"
    config.phases = ("sft",)
    config.output_dir = "/tmp/output/lossless"
    config.train_mask_row = False
    config.lora_config.lora_dropout = 0.0
    config.max_length = 512
    config.batch_size = 4
    config.gradient_accumulation_steps = 1
    config.learning_rate = 2e-3
    config.lr_schedule = "linear"
    config.warmup_steps = 10
    config.epochs = 3
    config.batching = "grouped"
    config.remat = "none"  # noise rows are few; with mesh.fsdp above 1: full
    config.log_interval = 10
    config.log_frequency_per_epoch = 2
    config.sample_prompts = 2
    return config
