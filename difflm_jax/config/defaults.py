"""Every key of a configuration with its default. Keys of the original PyTorch system keep their names and values."""

from ml_collections import ConfigDict, config_dict

from difflm_jax.config.checks import PHASES

# Keys that a phase may have for itself, under `pretrain` and `sft`; None there means: as the common key.
PHASE_KEYS = {"dataset": str, "epochs": int, "learning_rate": float, "max_steps": int, "batch_size": int}


def default_config() -> ConfigDict:
    """Every key with its default. Config files start from this and change what they need."""
    config = ConfigDict(
        {
            # What is trained, on what, and where it goes.
            "model": "Qwen/Qwen3-4B-Instruct-2507",  # a hub id, a Hugging Face directory or a .gguf file
            "revision": "",  # of a hub id
            "adapter": "",  # a PEFT directory to start from
            "dataset": "allenai/tulu-3-sft-mixture-0225",  # a hub id, a file or a directory
            "output_dir": "/tmp/output",
            "cache_dir": "",  # of tokenised rows; empty: the default of `datasets`
            "phases": ("pretrain", "sft"),
            "debug": False,  # 100 examples, and names that begin with "debug-" on Weights & Biases
            "seed": 42,
            "trained": "adapter",  # or all: every weight, held in float32
            # Model.
            "dtype": "bfloat16",  # float32, or auto: what the machine computes fastest
            "quantization": "",  # of the frozen projections: nf4, int4 or int8; empty: none
            "quantization_block_size": 64,  # weights along the input that share a scale
            "convert_cache": True,  # keep a quantised base in output_dir/converted
            "mask_token": "",  # empty: chosen by rule, and announced
            "remat": "full",  # or save_attention, save_dots, none: more memory, less computed twice
            "unroll_layers": False,  # True: no loop over layers in a training step; on a GPU faster, minutes to compile
            "attention": "full",
            "attention_kernel": "xla",  # or a fused one: cudnn (NVIDIA's), pallas (ours, on TPUs)
            "block_length": 0,  # of attention "block"
            "logit_shift": False,
            "lora_config": {
                "r": 16,
                "lora_alpha": 32,
                "lora_dropout": 0.05,
                "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                "bias": "none",
                "use_rslora": False,
            },
            "train_mask_row": True,  # False: the adapter is LoRA alone, and the mask's embedding is the base's
            "use_qlora": False,  # the original system's switch: quantization by qlora_config
            "qlora_config": {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,  # of nf4, however it was chosen
                "bnb_4bit_compute_dtype": "bfloat16",  # must be dtype
            },
            # Data.
            "max_length": 768,
            "test_size": 0.1,
            "answers": "last",
            "overlong": "cut",
            "bad_row_budget": 0.01,  # share of rows that may be unusable
            "answer_padding": 0,  # answers are filled up with EOS to a multiple (0: of block_length)
            "batching": "rows",  # or grouped (by length), packed (several examples a row), shared (and a prefix once)
            "length_multiple": 64,  # batches are padded to a multiple of this
            "dataloader_num_workers": 4,
            "pin_memory": True,
            # Objective.
            "mask_rate": "batch",
            "min_mask_probability": 0.1,
            "max_mask_probability": 0.95,
            "loss_tokens": "all",
            "loss_weight": "uniform",
            "loss_average": "tokens",  # answers: every answer counts the same
            "eos_loss": "all",  # first: the tokens that fill an answer up are not scored
            "complementary_masks": False,  # each row twice, with its mask and with the complement
            "on_policy": 0.0,  # share of rows in states of the model's own decoding
            "on_policy_passes": 1,
            "on_policy_tokens": "reference",
            "distillation_weight": 0.0,  # of the divergence from the causal base
            "anneal_steps": 0,  # steps in which edges to later tokens are opened at random; 0: open from the start
            "anneal_power": 1.0,  # above 1: slowly first
            "block_growth_steps": 0,  # steps in which blocks grow from 1 to block_length; 0: they do not
            "loss_chunk": 512,  # positions whose logits exist at once
            # Optimisation.
            "epochs": 1,
            "max_steps": 0,  # 0: by epochs
            "batch_size": 16,  # rows of a micro-batch, over all devices
            "gradient_accumulation_steps": 4,
            "learning_rate": 2e-4,
            "lr_schedule": "linear",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "adam_b1": 0.9,
            "adam_b2": 0.999,
            "adam_eps": 1e-8,
            "max_grad_norm": 1.0,  # 0: no clipping
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # devices along each axis; -1: all that are left
            "max_nonfinite_steps": 10,  # so many skipped steps in a row end the run
            # Evaluation, logs and checkpoints.
            "log_interval": 1000,  # optimiser steps
            "log_frequency_per_epoch": 4,  # evaluations and checkpoints
            "eval_rows": 0,  # of the test split; 0: all
            "keep_checkpoints": 2,
            "heartbeat_seconds": 60.0,  # output_dir/heartbeat.json is replaced so often; 0: never
            "profile": {"first_step": 1, "steps": 0},  # a jax.profiler trace of these steps of each phase
            "diffusion_steps": 10,
            "algorithm": "confidence",  # which masks are committed first when sampling
            "sample_prompts": 8,  # of the test split, answered at each evaluation; 0: none
            "sample_tokens": 128,
            # Questions answered at the end of the run, beside the causal base; empty data: none, rows 0: all.
            "report": {"data": "", "max_new_tokens": 32, "tokens_per_pass": (1, 2, 4), "rows": 0},
            "wandb_config": {
                "project": "llm-diffusion",  # empty: off
                "entity": "",  # empty: the account's own
                "wandb_log_path": "/tmp/wandb",
                "mode": "auto",  # online with an account, offline without
            },
        }
    )
    for phase in PHASES:
        config[phase] = ConfigDict({key: config_dict.placeholder(kind) for key, kind in PHASE_KEYS.items()})
    return config
