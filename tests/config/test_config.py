"""Tests every way to set a key, every refusal, and the configuration on disk."""

import json

import pytest
from ml_collections import ConfigDict

from difflm_jax.config.checks import validate
from difflm_jax.config.docs import markdown
from difflm_jax.config.files import (
    difference,
    from_json,
    load_config,
    load_run_config,
    notes,
    phase_config,
    quantization,
    take_overrides,
    to_json,
)
from difflm_jax.config.schema import KEYS, PHASE_KEYS, default_config
from difflm_jax.data.examples import PHASES
from difflm_jax.errors import UserError
from difflm_jax.quant import QuantConfig
from difflm_jax.train import command
from difflm_jax.training.resume import check_config, settle_dtype

# The original system's keys and defaults. Only `entity` differs (it was the author's own account).
ORIGINAL = {
    "model": "Qwen/Qwen3-4B-Instruct-2507",
    "dataset": "allenai/tulu-3-sft-mixture-0225",
    "debug": False,
    "seed": 42,
    "learning_rate": 2e-4,
    "test_size": 0.1,
    "dataloader_num_workers": 4,
    "pin_memory": True,
    "output_dir": "/tmp/output",
    "epochs": 1,
    "batch_size": 16,
    "gradient_accumulation_steps": 4,
    "log_interval": 1000,
    "lora_config": {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "bias": "none",
    },
    "wandb_config": {"project": "llm-diffusion", "entity": "", "wandb_log_path": "/tmp/wandb"},
    "log_frequency_per_epoch": 4,
    "use_qlora": False,
    "qlora_config": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "max_length": 768,
    "diffusion_steps": 10,
}


def _leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _refusal(*overrides, path="", hyper_parameters_json=""):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, hyper_parameters_json)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_original_keys_and_defaults_are_there():
    ours = json.loads(to_json(default_config()))
    for key, value in ORIGINAL.items():
        assert (ours[key] | value if isinstance(value, dict) else value) == ours[key], key


def test_the_defaults_are_valid_and_the_whole_original_json_changes_nothing():
    assert difference(load_config(), default_config()) == []
    assert difference(load_config(hyper_parameters_json=json.dumps(ORIGINAL)), default_config()) == []


def test_every_key_takes_its_own_default_from_the_command_line():
    for key, value in _leaves(default_config().to_dict()):
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if value is None else value
        assert difference(load_config(overrides=[f"--config.{key}={text}"]), default_config()) == []


def test_the_original_yaml_works_unchanged_even_where_yaml_reads_a_number_as_text(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("debug: false\nbatch_size: 20\nlearning_rate: 1e-3\nlora_config:\n  r: 8\n  lora_alpha: 16\n")
    config = load_config(str(path))
    assert (config.batch_size, config.learning_rate, config.lora_config.r) == (20, 1e-3, 8)
    assert config.lora_config.lora_dropout == 0.05


def test_later_sources_win(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"epochs": 2, "batch_size": 2, "max_length": 32}')
    config = load_config(str(path), ["--config.epochs=4"], '{"epochs": 3, "batch_size": 3}')
    assert (config.epochs, config.batch_size, config.max_length) == (4, 3, 32)


def test_a_python_file_starts_from_the_defaults(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from difflm_jax.config import default_config\n\n"
        "def get_config():\n    config = default_config()\n    config.phases = ['sft']\n"
        "    config.sft.learning_rate = 1e-4\n    config.lora_config.r = 4\n    return config\n"
    )
    config = load_config(str(path))
    assert (config.phases, config.sft.learning_rate, config.lora_config.r) == (("sft",), 1e-4, 4)


@pytest.mark.parametrize("name", ["recommended", "quickstart"])
def test_the_configs_of_our_own_recipe_share_it(name, pytestconfig):
    config = load_config(str(pytestconfig.rootpath / "configs" / f"{name}.py"))
    assert (config.attention, config.logit_shift, config.algorithm) == ("prefix", True, "steady")
    assert (config.mask_rate, config.loss_tokens, config.answer_padding) == ("row", "masked", 16)


@pytest.mark.parametrize("name", ["pretrain", "sft", "two_phase", "qlora_12gb"])
def test_the_shipped_configs_load(name, pytestconfig):
    config = load_config(str(pytestconfig.rootpath / "configs" / f"{name}.py"))
    assert config.model == ORIGINAL["model"] and config.learning_rate == ORIGINAL["learning_rate"]
    assert config.phases == (PHASES if name in ("two_phase", "qlora_12gb") else (name,))
    assert quantization(config) == (QuantConfig("nf4") if name == "qlora_12gb" else None)


def test_a_quantised_base_is_chosen_by_either_switch():
    assert quantization(load_config()) is None
    assert quantization(load_config(overrides=["use_qlora=true"])) == QuantConfig("nf4")
    plain = ["use_qlora=true", "qlora_config.bnb_4bit_use_double_quant=false", "quantization_block_size=128"]
    assert quantization(load_config(overrides=plain)) == QuantConfig("nf4", 128, double_quant=False)
    assert quantization(load_config(overrides=["quantization=int8"])).format == "int8"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["use_qlora=true", "dtype=float32"], "bnb_4bit_compute_dtype='bfloat16' contradicts dtype='float32'"),
        (["use_qlora=true", "quantization=int8"], "use_qlora=True contradicts quantization='int8'"),
        (["on_policy=0.5", "complementary_masks=true"], "has no complement"),
        (["on_policy=0.5", "answers=all"], "decoding fills one answer"),
        (["on_policy=0.5", "on_policy_tokens=own"], "needs on_policy and distillation_weight"),
        (["loss_weight=context"], "needs loss_tokens='masked'"),
        (["block_growth_steps=10"], "block_growth_steps needs attention='block'"),
        (["use_qlora=true", "qlora_config.bnb_4bit_quant_type=fp4"], "bnb_4bit_quant_type must be 'nf4'"),
        (["use_qlora=true", "qlora_config.load_in_4bit=false"], "load_in_4bit must be true, not false"),
        (["trained=all", "quantization=int8"], "codes cannot be trained"),
        (["trained=all", "adapter=there"], "merge it first"),
        (["trained=all", "distillation_weight=1"], "no frozen base"),
        (["trained=all", "train_mask_row=false"], "train_mask_row=false contradicts"),
    ],
)
def test_contradicting_switches_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(overrides=overrides)


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        ("('q_proj',)", ("q_proj",)),
        ('["o_proj", "up_proj"]', ("o_proj", "up_proj")),
    ],
)
def test_lists_on_the_command_line(text, modules):
    assert load_config(overrides=[f"lora_config.target_modules={text}"]).lora_config.target_modules == modules
    assert load_config(overrides=["report.tokens_per_pass=1,8"]).report.tokens_per_pass == (1, 8)


def test_words_for_true_and_false():
    for word, value in {"true": True, "True": True, "yes": True, "1": True, "false": False, "no": False}.items():
        assert load_config(overrides=[f"debug={word}"]).debug is value


def test_take_overrides_leaves_the_rest():
    flags = ["--config.epochs=2", "--config.mesh.data", "-1", "--config.debug", "--config.model=a=b"]
    overrides, others = take_overrides(["prog", "--config=a.py", *flags, "x"])
    assert overrides == ["epochs=2", "mesh.data=-1", "debug=true", "model=a=b"]
    assert others == ["prog", "--config=a.py", "x"]
    with pytest.raises(UserError, match=r"--config\.epochs=VALUE"):
        take_overrides(["--config.epochs"])
    with pytest.raises(UserError, match=r"--config\.epochs=VALUE"):
        take_overrides(["--config.epochs", "--config.debug"])


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rte", "learning_rate"),
        ("lora_config.rank", "lora_config.r"),
        ("lora_confg.r", "lora_config.r"),
        ("lora_alpha", "lora_config.lora_alpha"),
        ("sft.epoch", "sft.epochs"),
        ("model.name", "model"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key, nearest):
    assert _refusal(f"{key}=1") == f"--config.{key}: unknown key (did you mean {nearest}?)"
    nested = 1
    for part in reversed(key.split(".")):
        nested = {part: nested}
    message = _refusal(hyper_parameters_json=json.dumps(nested))
    assert message == f"--hyper_parameters_json: {key}: unknown key (did you mean {nearest}?)"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=fast", "--config.learning_rate must be a number, not 'fast'"),
        ("epochs=1.5", "--config.epochs must be an integer, not '1.5'"),
        ("debug=maybe", "--config.debug must be true or false, not 'maybe'"),
        ("report.tokens_per_pass=1,x", "--config.report.tokens_per_pass must be a list of integers, not '1,x'"),
        ("sft.epochs=x", "--config.sft.epochs must be an integer or none, not 'x'"),
        ("epochs", "--config.epochs: write --config.epochs=VALUE"),
    ],
)
def test_a_wrong_type_names_key_type_and_value(override, message):
    assert _refusal(override) == message


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": True},
        {"epochs": 1.5},
        {"epochs": None},
        {"debug": 2},
        {"model": 3},
        {"phases": 1},
        {"max_length": 1e999},
    ],
)
def test_wrong_types_in_json(values):
    (key,) = values
    assert _refusal(hyper_parameters_json=json.dumps(values)).startswith(f"--hyper_parameters_json: {key} must be ")


def test_a_section_is_no_value_and_a_value_no_section():
    assert "lora_config is a section" in _refusal("lora_config=8")
    assert "lora_config is a section" in _refusal(hyper_parameters_json='{"lora_config": null}')
    assert "model must be a string" in _refusal(hyper_parameters_json='{"model": {}}')
    assert difference(load_config(hyper_parameters_json='{"lora_config": {}}'), default_config()) == []


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("learning_rate=0", "learning_rate must be greater than 0"),
        ("learning_rate=nan", "learning_rate must be greater than 0"),
        ("learning_rate=inf", "learning_rate must be greater than 0"),
        ("batch_size=0", "batch_size"),
        ("sft.batch_size=0", "sft.batch_size"),
        ("pretrain.dataset=", "pretrain.dataset must not be empty"),
        ("output_dir=", "output_dir"),
        ("max_length=1", "max_length"),
        ("seed=-1", "seed"),
        ("test_size=1", "test_size"),
        ("mesh.data=0", "mesh.data"),
        ("lora_config.r=0", "lora_config.r"),
        ("lora_config.lora_dropout=1", "lora_config.lora_dropout"),
        ("lora_config.bias=all", "lora_config.bias must be 'none'"),
        ("lora_config.target_modules=q_proj,qproj", "lora_config.target_modules: 'qproj'"),
        ("lora_config.target_modules=", "lora_config.target_modules must not be empty"),
        ("lora_config.target_modules=q_proj,q_proj", "lora_config.target_modules names something twice"),
        ("phases=rl", "phases: 'rl'"),
        ("phases=", "phases must not be empty"),
        ("report.tokens_per_pass=0", "report.tokens_per_pass"),
        ("min_mask_probability=0", "min_mask_probability"),
        ("max_mask_probability=1.01", "max_mask_probability"),
        ("max_mask_probability=0.05", "min_mask_probability=0.1 must not exceed max_mask_probability=0.05"),
        ("attention=causal", "attention must be 'full' or 'prefix' or 'block', not 'causal'"),
        ("algorithm=best", "algorithm must be 'confidence' or"),
        ("dtype=float16", "dtype"),
        ("trained=lora", "trained must be 'adapter' or 'all'"),
        ("wandb_config.mode=sometimes", "wandb_config.mode"),
        ("quantization=nf5", "quantization='nf5'"),
        ("quantization_block_size=48", "quantization_block_size=48"),
    ],
)
def test_a_value_out_of_range_names_its_key(override, part):
    assert part in _refusal(override)


def test_all_answers_need_full_attention():
    assert load_config(overrides=["answers=all"]).answers == "all"
    assert "answers='all' needs attention='full'" in _refusal("answers=all", "attention=prefix")


def test_a_prefix_is_shared_only_where_it_does_not_depend_on_what_follows_it():
    assert load_config(overrides=["batching=shared", "attention=prefix"]).batching == "shared"
    assert "choose batching='packed'" in _refusal("batching=shared", "attention=full")


def test_block_attention_and_its_block_length_go_together():
    assert load_config(overrides=["attention=block", "block_length=8", "mask_rate=block"]).block_length == 8
    assert "needs one" in _refusal("attention=block")
    assert "belongs to attention='block'" in _refusal("block_length=8")
    assert "mask_rate='block' needs attention='block'" in _refusal("mask_rate=block")
    assert "must be a multiple of block_length=8" in _refusal("attention=block", "block_length=8", "answer_padding=12")


_PYTHON = """from difflm_jax.config import default_config
def get_config():
    config = default_config()
    {}
    return config
"""


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.toml", "", "ends in .py, .yaml or .json"),
        ("a.json", '{"epochs": }', "no valid JSON: Expecting value: line 1 column 12"),
        ("a.json", "[1]", "must hold keys and values, not list"),
        ("a.yaml", "epochs: [1", "no valid YAML"),
        ("a.yaml", "epochs: 0", "epochs must be greater than 0"),
        ("a.py", "x = 1\nraise ValueError('no luck')", "a.py:2: ValueError: no luck"),
        ("a.py", "def get_config(:", "a.py:1: SyntaxError"),
        ("a.py", "x = 1", "a.py:1: AttributeError"),
        ("a.py", "def get_config():\n    return 3", "must return a ConfigDict, not int"),
        ("a.py", _PYTHON.format("config.epoch = 2"), "epoch: unknown key (did you mean epochs?)"),
        ("a.py", _PYTHON.format("config.epochs = 'x'"), "a.py:4: TypeError"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, part):
    path = tmp_path / name
    path.write_text(text)
    message = _refusal(path=str(path))
    assert part in message
    if "must be greater" not in part:  # ranges are checked after all sources are read
        assert str(path) in message


def test_files_that_cannot_be_read(tmp_path):
    assert "nowhere.py: no such file" in _refusal(path=str(tmp_path / "nowhere.py"))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    assert "binary.json: cannot be read" in _refusal(path=str(tmp_path / "binary.json"))


def test_phase_config_resolves_a_phases_own_values():
    config = load_config(
        overrides=["epochs=3", "sft.epochs=5", "sft.dataset=other.jsonl", "pretrain.learning_rate=none"]
    )
    pretrain, sft = phase_config(config, "pretrain"), phase_config(config, "sft")
    assert (pretrain.epochs, pretrain.dataset, pretrain.learning_rate) == (3, config.dataset, 2e-4)
    assert (sft.epochs, sft.dataset, sft.learning_rate) == (5, "other.jsonl", 2e-4)
    assert not set(PHASES) & set(sft)
    assert (config.epochs, set(config.sft)) == (3, set(PHASE_KEYS))  # untouched


def test_a_loaded_config_is_locked():
    with pytest.raises((AttributeError, KeyError)):
        load_config().learning_rte = 1.0


def test_json_is_stable_and_comes_back_equal():
    config = load_config(overrides=["phases=sft", "sft.learning_rate=1e-4", "adam_eps=1e-6"])
    text = to_json(config)
    assert difference(from_json(text), config) == [] and to_json(from_json(text)) == text
    assert list(json.loads(text)) == sorted(json.loads(text))
    with pytest.raises(UserError, match=r"^run/config\.json: epoch: unknown key"):
        from_json('{"epoch": 1}', "run/config.json: ")


def test_difference_names_what_changed():
    new = load_config(overrides=["epochs=2", "lora_config.target_modules=q_proj", "sft.max_steps=5"])
    assert difference(default_config(), default_config()) == []
    assert difference(default_config(), new) == [
        "epochs: 1 -> 2",
        'lora_config.target_modules: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]'
        ' -> ["q_proj"]',
        "sft.max_steps: null -> 5",
    ]


def test_pin_memory_is_accepted_and_announced():
    assert notes(load_config()) == []
    (line,) = notes(load_config(overrides=["pin_memory=false"]))
    assert line.startswith("pin_memory has no effect")


def test_validate_takes_a_config_made_by_hand():
    config = ConfigDict(default_config().to_dict())
    config.lora_config.r = -1
    with pytest.raises(UserError, match=r"lora_config\.r must be greater than 0, not -1"):
        validate(config)


def test_every_key_is_documented_and_the_committed_page_is_current(pytestconfig):
    assert all(key.setting.help.endswith(".") for key in KEYS.values())
    assert (pytestconfig.rootpath / "docs" / "configuration.md").read_text() == markdown()


def test_help_of_training_names_every_key(capsys):
    assert command(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--config.{name}=" in shown for name, key in KEYS.items() if not key.optional)


BEGUN = (
    "use_qlora=true", "qlora_config.bnb_4bit_use_double_quant=false", "dtype=auto", "sft.learning_rate=5e-4",
    "lora_config.r=8", "report.tokens_per_pass=1,4",
)  # fmt: skip


def test_a_run_begun_before_the_aliases_resumes(tmp_path, pytestconfig):
    """version_1.json was written at commit 3ed94c5 with these overrides, and must load as the same configuration."""
    text = (pytestconfig.rootpath / "tests" / "config" / "version_1.json").read_text()
    (tmp_path / "config.json").write_text(text)
    quickstart = str(pytestconfig.rootpath / "configs" / "quickstart.py")
    again = settle_dtype(load_config(quickstart, [*BEGUN, f"output_dir={tmp_path}"]))
    begun = load_run_config(tmp_path / "config.json")
    assert quantization(begun) == QuantConfig("nf4", double_quant=False) and begun.dtype == "bfloat16"
    assert difference(begun, again) == [f'output_dir: "runs/quickstart" -> "{tmp_path}"']
    with pytest.raises(UserError, match=r"lora_config\.r: 8 -> 16"):
        check_config(tmp_path, load_config(quickstart, ["use_qlora=true"]), force=False)


def test_both_ways_to_say_nf4_are_one_configuration():
    original = load_config(hyper_parameters_json=json.dumps({**ORIGINAL, "use_qlora": True}))
    assert difference(original, load_config(overrides=["quantization=nf4"])) == []
    assert "use_qlora" not in original and "qlora_config" not in json.loads(to_json(original))


def test_all_linear_are_all_projections():
    assert difference(load_config(overrides=["lora_config.target_modules=all-linear"]), default_config()) == []
    assert "'all-linear' is not known" in _refusal("lora_config.target_modules=all-linear,q_proj")


def test_a_config_of_a_later_version_is_refused():
    assert from_json('{"config_version": 2, "epochs": 3}').epochs == 3
    with pytest.raises(UserError, match=r"^config\.json: config_version=3: written by a later version"):
        from_json('{"config_version": 3}')


def test_a_path_that_begins_with_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(overrides=["output_dir=~/run", "dataset=~/a~b.jsonl", "sft.dataset=~/c", "report.data=x~"])
    assert (config.output_dir, config.dataset) == ("/home/somebody/run", "/home/somebody/a~b.jsonl")
    assert (config.sft.dataset, config.report.data) == ("/home/somebody/c", "x~")
    assert _refusal("model=~nobody_here/x") == "--config.model=~nobody_here/x: there is no such home directory"


def test_an_original_key_at_its_default_decides_nothing():
    """use_qlora with dtype=auto became bfloat16, from a default of qlora_config that nobody had set."""
    assert load_config("", ["use_qlora=true", "dtype=auto"]).dtype == "auto"


def test_a_retired_key_is_dropped_from_a_run_alone():
    with pytest.raises(UserError, match="eval_batches: unknown key"):
        load_config("", [], '{"eval_batches": 10}')
    assert from_json('{"eval_batches": 10}') == from_json("{}")


@pytest.mark.parametrize("version", [0, -1, True, 99])
def test_a_version_that_is_none(version):
    with pytest.raises(UserError, match="config_version="):
        from_json(json.dumps({"config_version": version}))
