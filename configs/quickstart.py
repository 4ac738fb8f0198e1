"""The quickstart: SmolLM2-135M-Instruct becomes a masked-diffusion model on two CPU cores.

Command:   bash scripts/quickstart.sh     (makes the environment, fetches the model, then runs this config)
           python -m difflm_jax.train --config=configs/quickstart.py
           The original system's attention: --config.attention=full --config.logit_shift=false --config.batching=rows
           --config.batch_size=8
Hardware:  2 CPU cores without an accelerator, 3 GB of memory; with the environment, in float32,
           3 min (EPYC, AVX512_BF16) or 9 to 10 min (EPYC, AVX2).
           Where the processor multiplies bfloat16 (AMX) this recipe was not timed; an earlier one took a third.
           `dtype=auto` takes bfloat16 there and with AVX512_BF16; scores of both dtypes are in docs/quickstart.md.
Expect:    masked NLL of answers from about 3 to 0.6; at the end, on 60 held-out questions, the causal base's greedy
           exact match (0.70) next to the converted model's at 1, 2 and 4 tokens a forward pass. README.md shows it all.

Prefix attention and the logit shift keep the base's knowledge within so few steps; rates of 0.3 to 1 train what a
sampler meets that starts from masks alone; masks next to visible tokens count most (CART), as they are what a sampler
commits next; answers are padded with end-of-sequence tokens to the canvas of 16, so that
the end of an answer is learnt where it belongs.
"""

from ml_collections import ConfigDict

from difflm_jax.config import recommended_config


def get_config() -> ConfigDict:
    config = recommended_config()
    config.model = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.dataset = "builtin:quickstart"
    config.output_dir = "runs/quickstart"
    config.dtype = "auto"  # bfloat16, up to twice as fast as float32, where the processor multiplies it
    config.remat = "save_dots"  # faster than to keep everything: less memory to touch

    config.loss_chunk = 128

    # The system prompt of the chat template is half of every example: it stands once in a row of about 8 of them.
    config.batching = "shared"
    config.max_length = 264
    config.batch_size = 1
    config.mesh.data = 1
    config.length_multiple = 8
    config.answer_padding = 16
    config.test_size = 0.05

    config.epochs = 5
    config.pretrain.max_steps = 10
    config.sft.max_steps = 160
    config.gradient_accumulation_steps = 1
    config.learning_rate = 1e-3
    config.lora_config.lora_dropout = 0.0

    config.log_interval = 5
    config.log_frequency_per_epoch = 1
    config.sample_prompts = 4
    config.sample_tokens = 16
    config.diffusion_steps = 8
    config.wandb_config.project = ""
    config.report.data = "builtin:quickstart_heldout"
    config.report.max_new_tokens = 16
    return config
