"""Tests the quickstart's rows: well-formed and short, and no held-out fact can be learnt from training rows."""

import json
import re
from importlib.resources import files

from difflm_jax.checkpoint.source import open_source

STANDARD_FORM = re.compile(
    r"The (capital of|chemical symbol for|plural of|opposite of|official language of) (.+) is (.+)\.", re.DOTALL
)
KINDS = {"capital of": 30, "chemical symbol for": 9, "plural of": 9, "opposite of": 8, "official language of": 4}
MAX_ROW_TOKENS = 64
MAX_FACT_ANSWER_TOKENS = 14
MAX_CHAT_ANSWER_TOKENS = 24


def load(name: str) -> list[dict[str, str]]:
    text = (files("difflm_jax") / "data" / "builtin" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


TRAIN = load("quickstart")
HELD_OUT = load("quickstart_heldout")


def fact(row: dict[str, str]) -> tuple[str, str, str]:
    """Returns (kind, entity, value) of a held-out row, whose answer must be in the standard form."""
    match = STANDARD_FORM.fullmatch(row["answer"])
    assert match, row
    return match.groups()


def mentions(row: dict[str, str], phrase: str, *, ignore_case: bool = True) -> bool:
    text = f"{row['question']} {row['answer']}"
    return re.search(rf"\b{re.escape(phrase)}\b", text, re.IGNORECASE if ignore_case else 0) is not None


def question_form(row: dict[str, str], entity: str) -> str:
    assert entity in row["question"], row
    return row["question"].replace(entity, "{}")


def test_rows_are_a_question_and_a_sentence():
    for row in TRAIN + HELD_OUT:
        assert set(row) == {"question", "answer"}, row
        assert all(text and text == " ".join(text.split()) for text in row.values()), row
        assert row["answer"][0].isupper() or row["answer"][0].isdigit(), row
        assert row["answer"].endswith((".", "!", "?")), row


def test_fact_answers_end_with_a_period():
    assert all(row["answer"].endswith(".") for row in HELD_OUT)
    assert all(row["answer"].endswith(".") for row in TRAIN if STANDARD_FORM.match(row["answer"]))


def test_counts_and_kinds():
    assert 300 <= len(TRAIN) <= 500
    kinds = [fact(row)[0] for row in HELD_OUT]
    assert {kind: kinds.count(kind) for kind in kinds} == KINDS


def test_no_question_is_asked_twice():
    questions = [row["question"].casefold() for row in TRAIN + HELD_OUT]
    assert len(set(questions)) == len(questions)


def test_no_held_out_fact_leaks_into_training():
    """Neither the entity nor its value occurs in a training row; symbols are compared with case ("As" is not "as")."""
    for row in HELD_OUT:
        kind, entity, value = fact(row)
        for trained in TRAIN:
            assert not mentions(trained, entity), (row, trained)
            assert not mentions(trained, value, ignore_case=kind != "chemical symbol for"), (row, trained)


def test_every_held_out_question_form_is_trained_on_other_facts():
    trained = set()
    for row in TRAIN:
        match = STANDARD_FORM.fullmatch(row["answer"])
        if match and match[2] in row["question"]:
            trained.add((match[1], question_form(row, match[2])))
    for row in HELD_OUT:
        kind, entity, _ = fact(row)
        assert (kind, question_form(row, entity)) in trained


def test_a_third_of_the_facts_is_held_out():
    """Counts facts, not rows: a fact counts once, however many phrasings ask for it."""
    trained = {match.groups() for row in TRAIN if (match := STANDARD_FORM.fullmatch(row["answer"]))}
    share = len(HELD_OUT) / (len(HELD_OUT) + len(trained))
    assert 0.30 <= share <= 0.36


def test_rows_are_short_in_tokens(smollm2):
    tok = open_source(str(smollm2)).load_tokenizer()
    for row in TRAIN + HELD_OUT:
        is_fact = STANDARD_FORM.fullmatch(row["answer"]) is not None
        answer = len(tok(row["answer"], add_special_tokens=False)["input_ids"]) + 1  # <|im_end|>
        assert answer <= (MAX_FACT_ANSWER_TOKENS if is_fact else MAX_CHAT_ANSWER_TOKENS), row
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        whole = tok(tok.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
        assert len(whole) <= MAX_ROW_TOKENS, row
