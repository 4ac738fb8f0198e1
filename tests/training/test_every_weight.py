"""Training every weight (`trained=all`): against torch, and as a run whose result is a checkpoint of its own."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM

import difflm_jax
from difflm_jax import evaluate, export, generate
from difflm_jax.checkpoint.safetensors import open_files, open_shards
from difflm_jax.cli import run_command
from difflm_jax.config.files import load_config
from difflm_jax.harness import DiffusionHarness
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.transformer import Transformer
from difflm_jax.train import command
from difflm_jax.training.parameters import start
from difflm_jax.training.samples import SampleLogger
from tests.tiny import params_from_state_dict
from tests.tiny_run import train_arguments
from tests.training.test_against_peft import MASK, RULES, random_model, side_by_side

ALL = ("--config.trained=all", "--config.learning_rate=1e-3")


@pytest.mark.parametrize("tied", [True, False])
def test_thirty_steps_follow_torch(tied):
    """Losses and every weight, the embedding and the head (one array, or two) included."""
    rule, base = RULES["mdlm-prefix-shift"], random_model(tie_word_embeddings=tied, attention_bias=True)
    config = ModelConfig.from_hf(base.config.to_dict())
    params = params_from_state_dict(config, {k: v.detach().numpy().copy() for k, v in base.state_dict().items()})
    model = Transformer(config, mask_token_id=MASK, remat="full")
    losses, expected, trained = side_by_side(base, model, {}, {"params": params}, rule)
    assert min(expected[-3:]) < expected[0] - 1.0
    np.testing.assert_allclose(losses, expected, atol=2e-3)
    theirs = params_from_state_dict(config, {k: v.detach().numpy() for k, v in base.state_dict().items()})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-3), trained["params"], theirs)


@pytest.fixture(scope="module")
def finished(model, rows, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    assert command(train_arguments(model, rows, directory, *ALL)) == 0
    return directory / "run"


def weights(directory: Path) -> dict[str, np.ndarray]:
    files = open_shards(directory)
    return {name: files.read(name) for name in files.shapes}


def test_a_run_writes_checkpoints_in_which_every_weight_has_moved(finished, model):
    before, after = weights(model), weights(finished / "sft_model")
    assert before.keys() == after.keys()
    assert not [name for name in before if np.array_equal(before[name], after[name])]
    assert not (finished / "sft_model" / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(finished / "sft_model")
    trained_for = json.loads((finished / "sft_model" / "diffusion_config.json").read_text())
    assert (trained_for["attention"], trained_for["logit_shift"]) == ("prefix", True)


def test_an_interrupted_run_goes_on_to_the_same_weights(finished, model, rows, tmp_path, monkeypatch):
    """Stopped by an error in the second evaluation, that of the end of the first phase."""
    arguments = train_arguments(model, rows, tmp_path, *ALL)
    calls, whole = [], SampleLogger.__call__

    def failing(self, trained, step):
        calls.append(step)
        if len(calls) == 2:
            raise RuntimeError("the lights go out")
        whole(self, trained, step)

    with monkeypatch.context() as patched:
        patched.setattr(SampleLogger, "__call__", failing)
        with pytest.raises(RuntimeError, match="lights"):
            command(arguments)
    assert command(arguments) == 0
    again, undisturbed = weights(tmp_path / "run" / "sft_model"), weights(finished / "sft_model")
    assert all(np.array_equal(again[name], undisturbed[name]) for name in undisturbed)


def test_a_run_answers_and_is_scored_beside_the_base_it_came_from(finished, model, rows, tmp_path, capsys):
    flags = [
        "--max_new_tokens=4",
        "--tokens_per_pass=2",
        "--rows=3",
        "--likelihood=2",
        f"--out={tmp_path / 'out.json'}",
    ]
    assert (
        run_command(evaluate.main, evaluate.FLAGS, "", ["evaluate", f"--run={finished}", f"--data={rows}", *flags]) == 0
    )
    base = difflm_jax.load(model, causal=True, dtype="float32")
    found = json.loads((tmp_path / "out.json").read_text())
    questions = [question["messages"] for question in found["questions"]]
    assert found["generated"][0]["answers"] == base.generate(questions, 4, 4).texts
    lm = difflm_jax.load(finished / "sft_model", dtype="float32")
    assert found["generated"][1]["answers"] == lm.generate(questions, 4, 2).texts
    answers = [question["reference"] for question in found["questions"]]
    exact = base.log_likelihood(questions, answers).values
    np.testing.assert_allclose(found["likelihood"]["causal_base"]["log_likelihoods"], exact, rtol=1e-5)
    harness = DiffusionHarness(run=str(finished), causal="true", check_greedy="false")
    rows_of_harness = [Instance("loglikelihood", {}, ("1+1", "2."), 0)]
    (scored,) = harness.loglikelihood(rows_of_harness)
    expected = DiffusionHarness(model=str(model), causal="true", dtype="float32", check_greedy="false")
    assert scored == expected.loglikelihood(rows_of_harness)[0]
    capsys.readouterr()
    arguments = ["generate", f"--run={finished}", "--prompt=1+1", "--max_new_tokens=4", "--steps=2", "--causal"]
    shutil.copytree(model, tmp_path / "moved")
    arguments += [f"--model={tmp_path / 'moved'}"]
    assert run_command(generate.main, generate.FLAGS, "", arguments) == 0
    assert capsys.readouterr().out.strip() == base.generate(["1+1"], 4, 4).texts[0].strip()


def test_it_is_exported_as_a_checkpoint_and_not_as_an_adapter(finished, tmp_path, capsys):
    arguments = ["export", f"--run={finished}", f"--out={tmp_path / 'out'}"]
    assert run_command(export.main, export.FLAGS, "", arguments) == 1
    assert "trained every weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run_command(export.main, export.FLAGS, "", [*arguments, "--to=merged"]) == 0
    exported, trained = weights(tmp_path / "out"), weights(finished / "sft_model")
    assert all(np.array_equal(exported[name], trained[name]) for name in trained)


def test_the_masks_embedding_starts_at_the_mean_but_where_it_was_trained(finished, model, tmp_path):
    untouched = tmp_path / "untouched"
    difflm_jax.load(model, dtype="float32").save_pretrained(untouched)
    for trained in ("all", "adapter"):
        config = load_config("", [f"trained={trained}", "dtype=float32", "lora_config.r=2"])
        for source, knows in ((model, False), (untouched, False), (finished / "sft_model", True)):
            lm = difflm_jax.load(source, dtype="float32")
            table = np.asarray(lm.params["embed_tokens"]["weight"])
            expected = table[lm.mask_token_id] if knows else table[: len(lm.tokenizer)].mean(axis=0)
            begun = start(lm, config)
            found = begun.lora["mask_row"] if trained == "adapter" else begun.params["embed_tokens"]["weight"]
            found = found if trained == "adapter" else found[lm.mask_token_id]
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_a_mask_row_that_is_not_trained_leaves_lora_alone(model, rows, tmp_path):
    more = ("--config.train_mask_row=false", "--config.phases=sft", "--config.epochs=1")
    assert command(train_arguments(model, rows, tmp_path, *more)) == 0
    adapter = tmp_path / "run" / "sft_model"
    assert not [name for name in open_files([adapter / "adapter_model.safetensors"]).shapes if "embed" in name]
    assert not json.loads((adapter / "adapter_config.json").read_text()).get("trainable_token_indices")
    assert "mask_row" not in difflm_jax.load(model, adapter=adapter, dtype="float32").lora
    going_on = start(
        difflm_jax.load(model, adapter=adapter, dtype="float32"),
        load_config("", [f"adapter={adapter}", "dtype=float32", "lora_config.r=4"]),
    )
    row_it_was_trained_with = going_on.params["embed_tokens"]["weight"][going_on.mask_token_id]
    np.testing.assert_array_equal(going_on.lora["mask_row"], row_it_was_trained_with)
    assert going_on.merge().mask_is_trained
