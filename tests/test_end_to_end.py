"""The commands, from a Hugging Face directory to adapters: two phases, resume, generate, export; and bad input."""

import copy
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import difflm_jax
from difflm_jax import evaluate, export, generate
from difflm_jax.cli import run_command
from difflm_jax.errors import UserError
from difflm_jax.loading import load_model, open_model, read_run_config, spec_of_names
from difflm_jax.quant import QuantConfig
from difflm_jax.train import command
from difflm_jax.training import loop, samples
from difflm_jax.training.metrics import read_metrics
from difflm_jax.training.run import read_rows
from difflm_jax.training.step import make_train_step
from tests.tiny_checkpoint import save_tiny_model
from tests.tiny_run import TIMED, make_rows, train_arguments


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return save_tiny_model(directory, "llama", noise=0.0, max_position_embeddings=128, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture
def arguments(model_dir, rows, tmp_path):
    return train_arguments(model_dir, rows, tmp_path, "--config.log_interval=1", "--config.eval_interval=1")


@pytest.fixture(scope="module")
def finished(model_dir, rows, tmp_path_factory):
    """The directory of a finished two-phase run (not to be changed)."""
    tmp_path = tmp_path_factory.mktemp("finished")
    assert command(arguments.__wrapped__(model_dir, rows, tmp_path)) == 0
    return tmp_path / "run"


def tree_bytes(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_run_writes_what_the_readme_says(finished):
    assert {p.name for p in finished.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "heartbeat.json", "checkpoints", "pretrain_model", "sft_model",
    }  # fmt: skip
    records = read_metrics(finished)
    training = [r for r in records if "loss" in r]
    assert {r["phase"] for r in training} == {"pretrain", "sft"}
    needed = {
        "phase", "step", "loss", "masked_nll", "masked_accuracy", "perplexity", "learning_rate", "grad_norm", "tokens",
        "tokens_per_second", "mfu",
    }  # fmt: skip
    assert all(needed <= r.keys() for r in training)
    for phase in ("pretrain", "sft"):
        steps = [r["step"] for r in training if r["phase"] == phase]
        assert steps == sorted(set(steps))
        tokens = [r["tokens"] for r in training if r["phase"] == phase]
        assert tokens == sorted(set(tokens))
        rates = [r["learning_rate"] for r in training if r["phase"] == phase]
        assert rates[0] == pytest.approx(2e-4)  # the schedule starts anew in each phase
        assert rates == sorted(rates, reverse=True)
    evaluations = [r for r in records if "eval_loss" in r]
    assert all("loss" not in r and r["eval_by_mask_rate"] for r in evaluations)
    assert (finished / "samples.jsonl").read_text().count("\n") == 2 * len(evaluations)


def test_the_adapters_load_in_peft_and_change_the_output(finished, model_dir):
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        plain = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, finished / "sft_model")(tokens).logits.numpy()
    assert np.abs(adapted - plain.numpy()).max() > 1e-4
    lm = difflm_jax.load(model_dir, causal=True, adapter=finished / "sft_model", dtype="float32")
    np.testing.assert_allclose(np.asarray(lm(tokens.numpy())), adapted, atol=1e-5)
    assert difflm_jax.load(model_dir, adapter=finished / "sft_model").attention == "prefix"


def test_the_same_command_says_that_the_run_is_finished_and_leaves_every_byte(
    model_dir, rows, finished, tmp_path, capsys
):
    shutil.copytree(finished, tmp_path / "run")
    again = arguments.__wrapped__(model_dir, rows, tmp_path)
    stored = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(stored.replace(str(finished.parent), str(tmp_path)))
    before = tree_bytes(tmp_path / "run")
    assert command(again) == 0
    assert "finished" in capsys.readouterr().out
    assert tree_bytes(tmp_path / "run") == before


def test_an_interrupted_run_goes_on_to_the_same_numbers(arguments, finished, tmp_path, monkeypatch):
    """Stopped by an error in the third evaluation of the first phase; the second start ends with the same adapters.

    Each start compiles the step of a phase once.
    """
    calls, steps = [], []
    monkeypatch.setattr(loop, "make_train_step", lambda *options: steps.append(make_train_step(*options)) or steps[-1])
    whole = samples.SampleLogger.__call__

    def failing(self, lora, step):
        calls.append(step)
        if len(calls) == 3:
            raise RuntimeError("the lights go out")
        whole(self, lora, step)

    monkeypatch.setattr(samples.SampleLogger, "__call__", failing)
    with pytest.raises(RuntimeError, match="lights"):
        command(arguments)
    monkeypatch.setattr(samples.SampleLogger, "__call__", whole)
    assert command(arguments) == 0
    run = tmp_path / "run"
    for phase in ("pretrain", "sft"):
        name = f"{phase}_model/adapter_model.safetensors"
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    timeless = [{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(run)]
    expected = [{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(finished)]
    assert timeless == expected
    assert (run / "samples.jsonl").read_text() == (finished / "samples.jsonl").read_text()
    assert [step._cache_size() for step in steps] == [1, 1, 1]


def test_another_configuration_is_refused_with_the_difference(arguments, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    assert command([*arguments, "--config.learning_rate=1e-3"]) == 1
    assert "learning_rate: 0.0002 -> 0.001" in capsys.readouterr().err


def test_sft_goes_on_from_a_pretrained_adapter(arguments, finished, tmp_path):
    adapter = finished / "pretrain_model"
    assert command([*arguments, "--config.phases=sft", f"--config.adapter={adapter}", "--config.max_steps=1"]) == 0
    assert not (tmp_path / "run" / "pretrain_model").exists()
    assert (tmp_path / "run" / "sft_model" / "adapter_config.json").is_file()


def test_block_attention_trains_and_answers_in_its_blocks(arguments, model_dir, tmp_path, capsys):
    block = ["--config.attention=block", "--config.block_length=4", "--config.mask_rate=block"]
    assert command([*arguments, *block, "--config.phases=sft", "--config.max_steps=1"]) == 0
    lm = difflm_jax.load(model_dir, adapter=tmp_path / "run" / "sft_model", dtype="float32")
    assert (lm.attention, lm.block_length, lm.logit_shift) == ("block", 4, True)
    capsys.readouterr()
    run = ["generate", f"--run={tmp_path / 'run'}", "--max_new_tokens=10", "--prompt=1+1"]
    assert run_command(generate.main, generate.FLAGS, "", [*run, "--threshold=0.5", "--stats", "--noeos_last"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == lm.generate("1+1", max_new_tokens=10, threshold=0.5).texts[0].strip()
    assert "passes" in printed.err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--threshold=2"], "threshold must be in (0, 1]"),
        (["--threshold=0.9", "--factor=1"], "two rules"),
        (["--cache=huge"], "cache='huge'"),
        (["--infill", "--stop=x"], "--stop"),
        (["--infill", "--prompt=1+1=<|mask|>", "--nostop_at_eos"], "infill fills every mask"),
    ],
)
def test_flags_of_decoding_that_make_no_sense_are_one_line(finished, flags, named, capsys):
    run = ["generate", f"--run={finished}", "--max_new_tokens=8", "--prompt=1+1"]
    assert run_command(generate.main, generate.FLAGS, "", [*run, *flags]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert named in error
    assert "\n" not in error


def test_generate_answers_a_prompt_a_file_and_a_pipe(finished, tmp_path, capsys, monkeypatch):
    run = ["generate", f"--run={finished}", "--max_new_tokens=8", "--steps=4"]
    assert run_command(generate.main, generate.FLAGS, "", [*run, "--prompt=1+1"]) == 0
    alone = capsys.readouterr().out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1+1\n\nwhat is 2+2, and why?\n")
    assert run_command(generate.main, generate.FLAGS, "", [*run, f"--file={prompts}"]) == 0
    read = capsys.readouterr().out
    piped = subprocess.run(
        [sys.executable, "-m", "difflm_jax.generate", *run[1:]],
        input=prompts.read_text(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert read == piped.stdout
    assert len(read.splitlines()) == 3 and read.splitlines()[1] == ""  # line n answers line n
    assert read.splitlines()[0] == alone.rstrip("\n").replace("\\", "\\\\").replace("\n", "\\n")


def test_what_generate_cannot_do_is_said_before_or_at_once(finished, capsys, monkeypatch):
    def said(*flags: str) -> str:
        assert run_command(generate.main, generate.FLAGS, "", ["generate", f"--run={finished}", *flags]) == 1
        return capsys.readouterr().err

    assert "does not hold the mask token '<|mask|>'" in said("--infill", "--prompt=1+1 is [MASK]")
    assert "seed must be an integer in [0, 2^32)" in said("--prompt=1+1", "--max_new_tokens=4", f"--seed={2**32}")
    assert "not text in UTF-8" in said("--prompt=\udcff")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert "--infill fills texts" in said("--infill")
    config = json.loads((finished / "config.json").read_text())
    old = finished.parent / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps({**config, "eval_batches": 0}))
    assert read_run_config(old) == read_run_config(finished)  # a removed key


def test_a_chat_remembers_its_turns_until_it_is_reset(finished, capsys, monkeypatch):
    asked = []
    lines = iter(["1+1", "<|mask|>", "and 2+2?", "/reset", "1+1", "", "/help", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    whole = difflm_jax.LanguageModel.generate

    def recording(self, prompts, *arguments, **options):
        asked.append([message["role"] for message in prompts[0]])
        return whole(self, prompts, *arguments, **options)

    monkeypatch.setattr(difflm_jax.LanguageModel, "generate", recording)
    assert run_command(generate.main, generate.FLAGS, "", ["generate", f"--run={finished}", "--max_new_tokens=4"]) == 0
    turns = ["user", "assistant", "user"]
    assert asked == [["user"], turns, turns, ["user"]]  # what cannot be answered is no turn
    said = capsys.readouterr().err
    assert "/exit or Ctrl-D ends" in said and "error: generate: the prompt holds the mask token" in said


def test_a_line_of_a_file_is_a_prompt(tmp_path, monkeypatch):
    """Whatever a byte order mark or a line separator within a line do; other bytes than UTF-8's are refused."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufefffirst\r\n\nsecond\u2028still second\x0c\n".encode())
    values = copy.deepcopy(generate.FLAGS)
    values(["generate", f"--file={path}"])
    assert generate._lines(values) == ["first", "", "second\u2028still second\x0c"]
    values(["generate"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xe9t\xe9\n")))
    values.file = None
    with pytest.raises(UserError, match="standard input: not UTF-8 text"):
        generate._lines(values)


def test_evaluate_prints_its_tables_and_keeps_everything_in_one_file(finished, rows, tmp_path, capsys):
    out, text = tmp_path / "scores.json", tmp_path / "text.txt"
    text.write_text("Été, a text of several windows. " * 6)
    arguments = [
        "evaluate", f"--run={finished}", f"--data={rows}", "--rows=6", "--max_new_tokens=8", f"--out={out}",
        "--max_length=64", "--likelihood=4", f"--text={text}", "--seed=3", "--fluency",
        "--threshold=0.005", "--block_length=4",
    ]  # fmt: skip
    assert run_command(evaluate.main, evaluate.FLAGS, "", arguments) == 0
    printed = capsys.readouterr().out
    assert "causal base" in printed
    assert "mask rate" in printed
    assert "bits a byte" in printed
    record = json.loads(out.read_text())
    assert {"command", "time", "versions", "device", "seed", "model", "diffusion_config"} <= record.keys()
    assert record["versions"]["jax"] and record["seed"] == 3
    assert len(record["questions"]) == 6
    base = record["generated"][0]
    assert base["name"] == "causal base"
    assert base["minus_base_interval"] == [0, 0] and len(base["answers"]) == len(base["correct"]) == 6
    assert all(low <= c["accuracy"] <= high for c in record["generated"] for low, high in [c["interval"]])
    assert record["masked"]["masked_nll"] > 0
    assert record["decoding"] == {"threshold": 0.005, "seed": 3, "block_length": 4}
    column = record["generated"][1]
    again = load_model(spec_of_names(run=str(finished))).generate(
        [question["messages"] for question in record["questions"]], 8, 8, 4, seed=3, threshold=0.005
    )
    assert column["passes"] == again.steps.tolist() and max(column["passes"]) < 8
    assert column["answers"] == again.texts
    reads = record["fluency"]["causal base"]
    assert reads["tokens"]["mean"] == np.mean([len(tokens) for tokens in base["tokens"]])
    lm = difflm_jax.load(record["model"], causal=True, dtype="float32")
    prompts = [question["messages"] for question in record["questions"]]
    kept = [i for i, tokens in enumerate(base["tokens"]) if tokens[1:] or tokens[0] not in lm.eos_token_ids]
    own = lm.log_likelihood([prompts[i] for i in kept], [base["tokens"][i] for i in kept])
    assert reads["base_nll"]["mean"] == pytest.approx(-own.values.sum() / own.tokens.sum(), rel=1e-4)
    found = record["likelihood"]["diffusion"]
    assert len(found["log_likelihoods"]) == 6 and found["monte_carlo_error"] > 0
    assert record["likelihood"]["causal_base"]["monte_carlo_error"] == 0
    assert sum(record["text"]["bytes"]) == len(text.read_bytes())
    tokens = record["text"]["causal_base"]["tokens"]
    assert (sum(tokens), max(tokens)) == (len(text.read_bytes()), 63)  # a token a byte
    assert list(tmp_path.glob(".scores*")) == []


def test_evaluate_scores_the_rows_that_a_run_held_out(finished, rows, tmp_path, capsys):
    """Regression: scores on training rows were printed without a notice."""
    out = tmp_path / "scores.json"
    run = ["evaluate", f"--run={finished}", "--max_new_tokens=2", "--tokens_per_pass=2", "--nocausally", "--show=0"]
    assert run_command(evaluate.main, evaluate.FLAGS, "", [*run, "--held_out", f"--out={out}"]) == 0
    printed = capsys.readouterr()
    assert "note: the run was trained on" not in printed.err
    asked = {question["messages"][-1]["content"] for question in json.loads(out.read_text())["questions"]}
    config = read_run_config(finished)
    lm = open_model(spec_of_names(run=str(finished)))
    train_rows, _ = read_rows(config, "sft", lm)
    trained = [lm.tokenizer.decode(tokens) for tokens in train_rows["tokens"]]
    everything = {json.loads(line)["question"] for line in rows.read_text().splitlines()}
    assert asked and asked == {q for q in everything if not any(f"user\n{q}<" in text for text in trained)}
    assert f"{len(asked)} rows of {rows} that {finished} did not train on" in printed.out
    assert run_command(evaluate.main, evaluate.FLAGS, "", [*run, f"--data={rows}", "--rows=1"]) == 0
    assert f"note: the run was trained on rows of --data={rows}: --held_out scores those" in capsys.readouterr().err
    for more, message in ((["--held_out", f"--data={rows}"], "leave out --data"), (["--model=x"], "name the rows")):
        assert run_command(evaluate.main, evaluate.FLAGS, "", [*run, *more]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--held_out"], "--held_out: name the run that held rows out with --run"),
        (["--task=countdown", "--likelihood=2"], "--likelihood: rows of the task countdown hold no answer"),
        (["--task=gsm8k"], "rows.jsonl:1: its answer has no '#### number'"),
        (["--out={tmp}/nowhere/scores.json"], "nowhere/scores.json: cannot be written"),
        (["--task=nosuch"], "--task"),
        (["--data={tmp}/empty.jsonl"], "empty.jsonl: holds no rows"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_the_model_is_read(rows, tmp_path, capsys, more, message):
    (tmp_path / "empty.jsonl").touch()
    arguments = ["evaluate", "--model=not/read", f"--data={rows}", *(item.format(tmp=tmp_path) for item in more)]
    assert run_command(evaluate.main, evaluate.FLAGS, "", arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_evaluate_refuses_blocks_before_it_scores(finished, rows, capsys):
    arguments = ["evaluate", f"--run={finished}", f"--data={rows}", "--max_new_tokens=8", "--block_length=3"]
    assert run_command(evaluate.main, evaluate.FLAGS, "", arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.endswith("max_new_tokens=8 must be a multiple of block_length=3\n") and "nll" not in printed.out


def check_base(merged, model_dir, capsys):
    """A merged checkpoint's own weights are not the causal base that it is compared with, if that is named."""
    row = merged.parent / "row.jsonl"
    row.write_text('{"question": "1+1", "answer": "2."}\n')
    run = ["evaluate", f"--model={merged}", f"--data={row}", "--max_new_tokens=4", "--tokens_per_pass=4"]
    run += ["--dtype=float32", "--likelihood=2", f"--out={merged.parent / 'scores.json'}"]
    found = {}
    for base in ("", f"--base={model_dir}"):
        assert run_command(evaluate.main, evaluate.FLAGS, "", [*run, base][: len(run) + bool(base)]) == 0
        assert ("was itself trained as a diffusion model" in capsys.readouterr().out) == (not base)
        found[base] = json.loads((merged.parent / "scores.json").read_text())["likelihood"]["causal_base"][
            "log_likelihoods"
        ][0]
    lm = difflm_jax.load(model_dir, dtype="float32")
    exact = lm.base().log_likelihood(["1+1"], ["2."])
    assert found[f"--base={model_dir}"] == pytest.approx(exact.values[0], rel=1e-4)
    assert found[""] != pytest.approx(found[f"--base={model_dir}"], rel=1e-4)


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_export_writes_what_the_ecosystem_loads(finished, model_dir, tmp_path, kind, capsys):
    out = tmp_path / "out"
    arguments = ["export", f"--run={finished}", f"--to={kind}", f"--out={out}"]
    assert run_command(export.main, export.FLAGS, "", arguments) == 0
    tokens = np.array([[5, 6, 7, 259, 9, 10]])
    base = AutoModelForCausalLM.from_pretrained(model_dir if kind == "peft" else out)
    torch_model = PeftModel.from_pretrained(base, out) if kind == "peft" else base
    with torch.no_grad():
        expected = torch_model(torch.tensor(tokens)).logits.numpy()
    ours = difflm_jax.load(model_dir, causal=True, adapter=finished / "sft_model", dtype="float32")
    np.testing.assert_allclose(np.asarray(ours(tokens)), expected, atol=1e-5)
    if kind == "merged":
        check_base(out, model_dir, capsys)
        assert AutoTokenizer.from_pretrained(out).mask_token == "<|mask|>"
        merged = difflm_jax.load(out, dtype="float32")
        assert (merged.attention, merged.logit_shift, merged.lora) == ("prefix", True, None)


@pytest.fixture(scope="module")
def quantised(model_dir, rows, tmp_path_factory):
    """The directory of a finished run over a base in NF4 (not to be changed)."""
    tmp_path = tmp_path_factory.mktemp("quantised")
    held = ["quantization=nf4", "quantization_block_size=16", "phases=sft", "max_steps=2"]
    held = [f"--config.{override}" for override in held]
    assert command(arguments.__wrapped__(model_dir, rows, tmp_path) + held) == 0
    return tmp_path / "run"


def test_a_quantised_base_is_kept_beside_the_run_and_found_again(quantised, monkeypatch, capsys):
    assert [path.name[:4] for path in (quantised / "converted").iterdir()] == ["nf4-"]
    monkeypatch.setattr("difflm_jax.checkpoint.converted.load_params", None)  # whoever converts again fails
    flags = ["generate", f"--run={quantised}", "--prompt=1+1", "--max_new_tokens=8", "--steps=2"]
    assert run_command(generate.main, generate.FLAGS, "", flags) == 0
    assert capsys.readouterr().out.strip() != ""


def test_the_harness_holds_the_base_as_the_run_did(quantised):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
    from difflm_jax.harness import DiffusionHarness

    assert DiffusionHarness(run=str(quantised))._lm.quantization == QuantConfig("nf4", 16)
    assert DiffusionHarness(run=str(quantised), quantization="none")._lm.quantization is None


def test_a_merged_export_of_a_quantised_run_is_dense_and_says_so(quantised, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["export", f"--run={quantised}", "--to=merged", f"--out={out}"]
    assert run_command(export.main, export.FLAGS, "", flags) == 0
    assert "as nf4 holds it, dequantised" in capsys.readouterr().out
    tokens = np.array([[5, 6, 7, 259, 9, 10]])
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out)(torch.tensor(tokens)).logits.numpy()
    held = QuantConfig("nf4", 16)
    ours = difflm_jax.load(model_dir, causal=True, adapter=quantised / "sft_model", dtype="float32", quantization=held)
    np.testing.assert_allclose(np.asarray(ours(tokens)), found, atol=1e-5)
    dense = difflm_jax.load(model_dir, causal=True, adapter=quantised / "sft_model", dtype="float32")
    assert np.abs(np.asarray(dense(tokens)) - found).max() > 1e-4


BAD = {
    "unknown key": (["--config.learning_rat=1"], "did you mean learning_rate"),
    "wrong type": (["--config.batch_size=many"], "batch_size"),
    "bad choice": (["--config.attention=sideways"], "attention must be"),
    "4-bit base in another dtype": (["--config.use_qlora=true"], "qlora_config.bnb_4bit_compute_dtype"),
    "blocks that do not fit": (["--config.quantization=nf4"], "quantization_block_size=64"),
    "no such model": (["--config.model=./nowhere"], "nowhere"),
    "no such data": (["--config.dataset=./nowhere.jsonl"], "nowhere.jsonl"),
    "no such adapter": (["--config.adapter=./nowhere"], "nowhere"),
    "no such config": (["--config=./nowhere.py"], "nowhere.py"),
    "bad JSON": (["--hyper_parameters_json={"], "hyper_parameters_json"),
    "unknown flag": (["--learning_rate=1"], "learning_rate"),
    "too long": (["--config.max_length=500"], "max_position_embeddings"),
    "report data": (["--config.report.data=./nowhere.jsonl"], "nowhere.jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, arguments, tmp_path, capsys):
    extra, named = BAD[case]
    assert command([*arguments, *extra]) != 0
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert named in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_bad_rows_stop_the_run_before_it_begins(arguments, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n{"question": \n{"question": "c", "answer": "d"}\n')
    assert command([*arguments, f"--config.dataset={path}"]) == 1
    assert f"{path}:2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
