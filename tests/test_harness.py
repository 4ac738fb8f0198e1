"""lm-evaluation-harness itself, on task files of the test: its figures are those of the model's own methods."""

import json
from pathlib import Path

import numpy as np
import pytest

import difflm_jax
from difflm_jax import UserError
from tests.tiny_checkpoint import save_tiny_model

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")

CHOICES = [
    {"question": "2+2=", "choices": ["4", "5", "22"], "label": 0},
    {"question": "The sky is", "choices": ["green", "blue", "a cat"], "label": 1},
]
TEXTS = [
    "A short text.",
    "Another one, rather longer than that, so that it needs several windows of forty tokens. " * 2,
]
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: choices
target_delimiter: " "
metric_list: [{metric: acc}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "tiny_generate": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["Q"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    directory = save_tiny_model(tmp_path_factory.mktemp("model"))
    return difflm_jax.load(directory, attention="prefix", logit_shift=True, dtype="float32")


@pytest.fixture(scope="module")
def evaluated(lm, tmp_path_factory):
    """What `lm_eval.simple_evaluate` returns, and the model that it asked."""
    from lm_eval.tasks import TaskManager

    from difflm_jax.harness import DiffusionHarness

    folder = tmp_path_factory.mktemp("tasks")
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, rest in TASKS.items():
        data = folder / ("texts.jsonl" if "rolling" in name else "choice.jsonl")
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
            f"{rest}"
        )
    model = DiffusionHarness(lm, samples=8, max_length=41, batch_size=8)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=10), model


def samples(evaluated, task):
    return evaluated[0]["samples"][task]


def test_choices_are_scored_by_the_models_likelihood(lm, evaluated):
    canvases, continuations, greedy = [], [], []
    for row, sample in zip(CHOICES, samples(evaluated, "tiny_choice"), strict=True):
        prompt = lm.tokenizer(row["question"])["input_ids"]
        answers = [lm.tokenizer(f" {choice}")["input_ids"] for choice in row["choices"]]
        expected = lm.log_likelihood([prompt] * 3, answers, samples=8, batch_size=8)
        found = [float(response[0][0]) for response in sample["resps"]]
        np.testing.assert_allclose(found, expected.values, rtol=1e-4)
        assert sample["acc"] == float(np.argmax(expected.values) == row["label"])
        canvases += [[*prompt, *[lm.mask_token_id] * len(answer)] for answer in answers]
        continuations += answers
        greedy += [str(response[0][1]) for response in sample["resps"]]
    filled = lm.infill(canvases, steps=max(map(len, continuations)), algorithm="probability", batch_size=8).tokens
    decoded = [tokens[-len(answer) :].tolist() for tokens, answer in zip(filled, continuations, strict=True)]
    assert greedy == [str(tokens == answer) for tokens, answer in zip(decoded, continuations, strict=True)]


def test_rolling_likelihood_covers_every_token_once(lm, evaluated):
    eos, total = lm.tokenizer.eos_token_id, 0.0
    for text in TEXTS:
        tokens = lm.tokenizer(text)["input_ids"]
        for first in range(0, len(tokens), 40):
            window = tokens[first : first + 40]
            # lm-eval fills the last window of several up with as much of the text before it as there is room for.
            before = [eos] if first == 0 else tokens[max(0, first + len(window) - 41) : first]
            total += lm.log_likelihood([before], [window], samples=8, batch_size=8).values[0]
    size = sum(len(text.encode()) for text in TEXTS)
    found = evaluated[0]["results"]["tiny_rolling"]["bits_per_byte,none"]
    assert found == pytest.approx(-total / size / np.log(2), rel=1e-4)


def test_answers_are_generated_up_to_a_stop_string(lm, evaluated):
    found = [sample["resps"][0][0] for sample in samples(evaluated, "tiny_generate")]
    prompts = [lm.tokenizer(row["question"])["input_ids"] for row in CHOICES]
    assert found == lm.generate(prompts, 8, 8, stop="Q", batch_size=8).texts
    assert not any("Q" in text for text in found)


def with_template(directory: Path, single: str) -> Path:
    """The model's folder with a tokenizer that begins, or also ends, each text by itself."""
    path = directory / "tokenizer.json"
    stored = json.loads(path.read_text())
    ids = {token["content"]: token["id"] for token in stored["added_tokens"]}
    names = [piece.split(":")[0] for piece in single.split()]
    piece = {name: {"SpecialToken": {"id": name, "type_id": 0}} for name in ids}
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece.get(name, {"Sequence": {"id": "A", "type_id": 0}}) for name in names],
        "pair": [],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names if name in ids},
    }
    path.write_text(json.dumps(stored))
    about = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**about, "bos_token": "<|im_start|>"}))
    return directory


def requests(*pairs):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


def test_a_text_begins_with_bos_where_the_reference_harness_puts_one(tmp_path):
    """Log-likelihoods of the base are those of lm-eval's `hf` model, in pairs and rolling, with and without context."""
    from lm_eval.models.huggingface import HFLM

    from difflm_jax.harness import DiffusionHarness

    directory = str(with_template(save_tiny_model(tmp_path), "<|im_start|> A"))
    ours = DiffusionHarness(model=directory, causal=True, dtype="float32", max_length=64)
    reference = HFLM(pretrained=directory, dtype="float32", device="cpu", batch_size=1, max_length=64)
    pairs = [("2+2=", " 4"), ("The sky is ", "blue"), ("", "alone"), ("<|im_start|>user", " said")]
    assert ours.tok_encode("a") == reference.tok_encode("a")
    assert ours.tok_encode("a")[0] == ours.tokenizer.bos_token_id
    # Not to the bit: the mask token is no output here, and takes some 0.2 % of the probability there.
    found, expected = (model.loglikelihood(requests(*pairs), disable_tqdm=True) for model in (ours, reference))
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], atol=0.01)
    assert [same for _, same in found] == [same for _, same in expected]
    texts = requests(("A short text.",))
    (found,), (expected,) = (model.loglikelihood_rolling(texts, disable_tqdm=True) for model in (ours, reference))
    assert found == pytest.approx(expected, abs=0.05)


def test_an_eos_that_a_tokenizer_adds_does_not_end_a_prompt(tmp_path):
    from difflm_jax.harness import DiffusionHarness

    directory = with_template(save_tiny_model(tmp_path), "<|im_start|> A <|im_end|>")
    ours = DiffusionHarness(model=str(directory), causal=True, dtype="float32")
    bos, eos = ours.tokenizer.bos_token_id, ours.tokenizer.eos_token_id
    plain = ours.tok_encode("ab", add_special_tokens=False)
    assert len(plain) == 2 and ours.tok_encode("ab") == [bos, *plain]
    assert ours.tok_encode("ab", add_special_tokens=True) == [bos, *plain, eos]


def test_the_causal_base_and_a_model_by_its_path(lm):
    from difflm_jax.harness import DiffusionHarness

    base = DiffusionHarness(model=str(lm.source.path), causal="true", dtype="float32", check_greedy="false")
    prompt, answer = lm.tokenizer("2+2=")["input_ids"], lm.tokenizer(" 4")["input_ids"]
    (value, greedy), *_ = base._loglikelihood_tokens([(("2+2=", " 4"), prompt, answer)])
    assert value == pytest.approx(lm.base().log_likelihood([prompt], [answer]).values[0], rel=1e-5)
    assert greedy is False
    with pytest.raises(UserError, match="name a model or a training run"):
        DiffusionHarness()
    by_text = DiffusionHarness.create_from_arg_string(f"model={lm.source.path},batch_size=4", {"batch_size": 1})
    assert by_text._scoring.batch_size == 4
    with pytest.raises(UserError, match="tokens_per_pass=0"):
        DiffusionHarness(lm, tokens_per_pass=0)
    with pytest.raises(UserError, match="batch_size='auto'"):
        DiffusionHarness(lm, batch_size="auto")
