"""Every key of the config: the settings of the components, and of the run itself.

Each component declares its own settings (`difflm_jax.utils.settings`); those of the run as a whole are declared here.
`SECTIONS` joins them. Defaults, checks, help and docs are generated from it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from difflm_jax.data.chat import ANSWERS, OVERLONG
from difflm_jax.data.examples import PHASES
from difflm_jax.data.packing import BATCHING
from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import Corruption
from difflm_jax.diffusion.extras.settings import Extras
from difflm_jax.diffusion.lossless import Draft
from difflm_jax.diffusion.weights import LossRule
from difflm_jax.models.lora import LoraConfig
from difflm_jax.models.transformer import REMAT
from difflm_jax.ops.attention_kernels import KERNELS
from difflm_jax.quant import QuantConfig
from difflm_jax.sampling.options import ALGORITHMS
from difflm_jax.utils.dtypes import AUTO, DTYPES
from difflm_jax.utils.settings import (
    DEVICES,
    NOT_NEGATIVE,
    POSITIVE,
    PROPER_SHARE,
    SEED,
    SHARE,
    TWO_OR_MORE,
    Setting,
    setting,
)

# Keys that a phase may override in the sections `pretrain` and `sft`. None there means the common value.
PHASE_KEYS = ("dataset", "epochs", "learning_rate", "max_steps", "batch_size")


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained, on what, and where the results go."""

    model: str = setting(
        "Qwen/Qwen3-4B-Instruct-2507", "A hub id, a Hugging Face directory or a .gguf file.", required=True, path=True
    )
    revision: str = setting("", "Revision of a hub id.")
    adapter: str = setting("", "A PEFT directory to start from.", path=True)
    dataset: str = setting(
        "allenai/tulu-3-sft-mixture-0225", "A hub id, a file or a directory.", required=True, path=True
    )
    output_dir: str = setting(
        "/tmp/output", "The run directory. The same command resumes it.", required=True, path=True
    )
    cache_dir: str = setting("", "Where tokenised rows are cached; empty: the cache of `datasets`.", path=True)
    phases: tuple[str, ...] = setting(PHASES, "The phases, in order.", choices=PHASES, required=True)
    debug: bool = setting(False, "Train on 100 examples; names on Weights & Biases begin with debug-.")
    seed: int = setting(42, "Seed of everything random.", within=SEED)
    objective: str = setting(
        "masked",
        "masked: masked diffusion; draft: the adapter drafts, and the text is the base's own (docs/lossless.md).",
        choices=("masked", "draft"),
    )
    trained: str = setting("adapter", "all: every weight, with float32 masters.", choices=("adapter", "all"))


@dataclasses.dataclass(frozen=True)
class Model:
    """How the model is loaded and run."""

    dtype: str = setting(
        "bfloat16",
        "Dtype of the computation; auto: bfloat16 on accelerators and on CPUs that can multiply it.",
        choices=(AUTO, *DTYPES),
    )
    convert_cache: bool = setting(True, "Keep a quantised base in output_dir/converted.")
    chat_template: str = setting("", "Jinja file or text that replaces the tokenizer's chat template.")
    mask_token: str = setting("", "The mask token; empty: chosen by rule, and announced.")
    train_mask_row: bool = setting(True, "false: the adapter is LoRA alone, and the mask's embedding is the base's.")
    remat: str = setting(
        "full",
        "What the backward pass recomputes: everything (full), all but attention, all but attention and matmuls, or "
        "nothing.",
        choices=REMAT,
    )
    unroll_layers: bool = setting(
        False, "Compile every layer instead of a loop: 3 to 6 % faster on a GPU, minutes to compile."
    )
    attention_kernel: str = setting(
        "xla",
        "xla: on every backend; cudnn: NVIDIA's fused kernel, in bfloat16; pallas: ours, on TPUs.",
        choices=KERNELS,
    )
    algorithm: str = setting("confidence", "The decoding algorithm, stored with the adapter.", choices=ALGORITHMS)


@dataclasses.dataclass(frozen=True)
class Data:
    """From rows to batches."""

    max_length: int = setting(768, "Longest row, in tokens.", within=TWO_OR_MORE)
    test_size: float = setting(0.1, "Share of the rows in the test split.", within=PROPER_SHARE)
    answers: str = setting("last", "Assistant turns that are trained in the sft phase.", choices=ANSWERS)
    overlong: str = setting("cut", "What happens to a conversation longer than max_length.", choices=OVERLONG)
    columns: str = setting("", "Your names of columns: prompt=frage, response=antwort.", key="data.columns")
    roles: str = setting("", "Your names of speakers: user=Kunde, assistant=Agent.", key="data.roles")
    bad_row_budget: float = setting(0.01, "Share of rows that may be unusable.", within=SHARE)
    answer_padding: int = setting(
        0, "Answers are padded with EOS to a multiple of this; 0: of block_length.", within=NOT_NEGATIVE
    )
    batching: str = setting(
        "rows", "grouped: by length; packed: several examples per row; shared: packed, with their common prefix once.",
        choices=BATCHING,
    )  # fmt: skip
    row_examples: int = setting(
        0, "Packed rows are as wide as this many examples on average; 0: max_length.", within=NOT_NEGATIVE
    )
    length_multiple: int = setting(64, "Batches are padded to a multiple of this.", within=POSITIVE)
    dataloader_num_workers: int = setting(4, "Processes that prepare batches.", within=NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """Steps, AdamW and the learning rate."""

    epochs: int = setting(1, "Passes over the training rows.", within=POSITIVE)
    max_steps: int = setting(
        0,
        "Upper bound on optimiser steps: it may end an epoch early, and never adds steps; 0: none.",
        within=NOT_NEGATIVE,
    )
    batch_size: int = setting(16, "Rows of a micro-batch, over all devices.", within=POSITIVE)
    gradient_accumulation_steps: int = setting(4, "Micro-batches per optimiser step.", within=POSITIVE)
    learning_rate: float = setting(2e-4, "Peak learning rate.", within=POSITIVE)
    lr_schedule: str = setting("linear", "Decay after the warm-up.", choices=("linear", "cosine", "constant"))
    warmup_steps: int = setting(0, "Steps in which the learning rate rises from 0.", within=NOT_NEGATIVE)
    weight_decay: float = setting(0.0, "Decoupled weight decay.", within=NOT_NEGATIVE)
    adam_b1: float = setting(0.9, "Decay of the first moment.", within=PROPER_SHARE)
    adam_b2: float = setting(0.999, "Decay of the second moment.", within=PROPER_SHARE)
    adam_eps: float = setting(1e-8, "Added to the root of the second moment.", within=POSITIVE)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm; 0: no clipping.", within=NOT_NEGATIVE)
    max_nonfinite_steps: int = setting(10, "This many skipped steps in a row end the run.", within=POSITIVE)
    loss_chunk: int = setting(512, "Positions whose logits exist at once.", within=POSITIVE)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis."""

    data: int = setting(-1, "Groups of rows, each with a copy of the weights; -1: all devices left.", within=DEVICES)
    fsdp: int = setting(1, "Parts that weights are divided into, gathered per layer.", within=DEVICES)
    tensor: int = setting(1, "Parts that heads and MLP are divided into.", within=DEVICES)


@dataclasses.dataclass(frozen=True)
class Monitoring:
    """Evaluations, logs and checkpoints."""

    log_interval: int = setting(1000, "Optimiser steps between lines of metrics.jsonl.", within=POSITIVE)
    log_frequency_per_epoch: int = setting(4, "Evaluations and checkpoints per epoch.", within=POSITIVE)
    eval_interval: int = setting(
        0, "Optimiser steps between evaluations; 0: by epoch, but at most a tenth of the work.", within=NOT_NEGATIVE
    )
    eval_rows: int = setting(0, "Rows of the test split that are evaluated; 0: all.", within=NOT_NEGATIVE)
    keep_checkpoints: int = setting(2, "Latest checkpoints that are kept, in addition to the best.", within=POSITIVE)
    heartbeat_seconds: float = setting(
        60.0, "Seconds between updates of output_dir/heartbeat.json; 0: never.", within=NOT_NEGATIVE
    )
    diffusion_steps: int = setting(10, "Forward passes per sample answer.", within=POSITIVE)
    sample_prompts: int = setting(
        8, "Prompts of the test split that each evaluation answers; 0: none.", within=NOT_NEGATIVE
    )
    sample_tokens: int = setting(128, "Tokens of a sample answer.", within=POSITIVE)


@dataclasses.dataclass(frozen=True)
class Profile:
    """A `jax.profiler` trace of some steps of each phase."""

    first_step: int = setting(1, "First step of the trace.", within=POSITIVE)
    steps: int = setting(0, "Steps of the trace; 0: none.", within=NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class Report:
    """Questions that the model and its causal base answer at the end of the run. A draft run compares their texts."""

    data: str = setting("", "Questions with answers, as for evaluate; empty: no report.", path=True)
    max_new_tokens: int = setting(128, "Tokens of an answer.", within=POSITIVE)
    tokens_per_pass: tuple[int, ...] = setting(
        (1, 2, 4), "Tokens committed per forward pass, one column each.", within=POSITIVE, required=True
    )
    rows: int = setting(0, "Questions; 0: all.", within=NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class Wandb:
    """Weights & Biases, or trackio, which has the same API and stays on this machine."""

    service: str = setting("wandb", "wandb or trackio (pip install trackio; local).", choices=("wandb", "trackio"))
    project: str = setting("llm-diffusion", "Project; empty: off.")
    entity: str = setting("", "Entity; empty: the account's own.")
    wandb_log_path: str = setting("/tmp/wandb", "Where its local files go.", path=True)
    mode: str = setting(
        "auto", "auto: wandb's own settings, else online with an API key, else offline.",
        choices=("auto", "online", "offline", "disabled"),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Original:
    """Keys of the original system: aliases (`config.aliases`), and keys with one allowed value or no effect."""

    use_qlora: bool = setting(False, "Alias of quantization=nf4.")
    load_in_4bit: bool = setting(True, "With use_qlora only true.", key="qlora_config.load_in_4bit")
    quant_type: str = setting("nf4", "With use_qlora only nf4.", key="qlora_config.bnb_4bit_quant_type")
    double: bool = setting(True, "Alias of double_quantization.", key="qlora_config.bnb_4bit_use_double_quant")
    compute: str = setting("bfloat16", "Alias of dtype, with use_qlora.", key="qlora_config.bnb_4bit_compute_dtype")
    bias: str = setting("none", "Biases are not trained.", key="lora_config.bias", choices=("none",))
    pin_memory: bool = setting(True, "No effect: JAX has no pinned host buffers to choose.")


# (dataclass, prefix of its keys, title in the docs); the order is that of the docs.
SECTIONS: tuple[tuple[type, str, str], ...] = (
    (Run, "", "Run"),
    (Model, "", "Model"),
    (QuantConfig, "", "Quantised base"),
    (LoraConfig, "lora_config.", "Adapter"),
    (Data, "", "Data"),
    (Corruption, "", "Objective"),
    (LossRule, "", "Objective"),
    (Extras, "", "Objective"),
    (Draft, "draft.", "Objective draft"),
    (DiffusionConfig, "", "Objective"),
    (Optimisation, "", "Optimisation"),
    (Mesh, "mesh.", "Devices"),
    (Monitoring, "", "Evaluation, logs and checkpoints"),
    (Profile, "profile.", "Evaluation, logs and checkpoints"),
    (Report, "report.", "Report"),
    (Wandb, "wandb_config.", "Weights & Biases"),
    (Original, "", "Names of the original system"),
)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the config: its origin, default and allowed values.

    kind: its type. element: the type of a list's elements. optional: None is allowed (in the sections of the phases).
    """

    name: str
    title: str
    owner: type
    field: str
    default: Any
    setting: Setting
    kind: type
    element: type | None = None
    optional: bool = False

    def __str__(self) -> str:
        """The type in words."""
        names = {str: "a string", int: "an integer", float: "a number", bool: "true or false", tuple: "a list"}
        elements = {str: " of strings", int: " of integers", None: ""}[self.element]
        return names[self.kind] + elements + (" or none" if self.optional else "")


def _keys() -> dict[str, Key]:
    keys = {}
    for owner, prefix, title in SECTIONS:
        for field in dataclasses.fields(owner):
            if (said := field.metadata.get("setting")) is None:
                continue
            default = field.default if said.config_default is None else said.config_default
            name = prefix + (said.key or field.name)
            element = type(default[0]) if isinstance(default, tuple) else None
            keys[name] = Key(name, title, owner, field.name, default, said, type(default), element)
    for phase in PHASES:
        for name in PHASE_KEYS:
            own = {"name": f"{phase}.{name}", "title": "Phases", "default": None, "optional": True}
            keys[own["name"]] = dataclasses.replace(keys[name], **own)
    return keys


KEYS: dict[str, Key] = _keys()


def default_config() -> ConfigDict:
    """Returns a config with every key at its default. Config files start from this and change what they need."""
    config = ConfigDict()
    for key in KEYS.values():
        value = config_dict.placeholder(key.kind) if key.optional else key.default
        section, _, leaf = key.name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[leaf] = value
    return config


def build(owner: type, config: ConfigDict, **others: Any) -> Any:
    """Builds the component `owner` from its settings in `config`. `others` are its fields that are not settings."""
    flat = flatten(config.to_dict())
    values = {key.field: flat[name] for name, key in KEYS.items() if key.owner is owner and not key.optional}
    return owner(**values, **others)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries into one with dotted keys. An empty dictionary is kept as a value."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
