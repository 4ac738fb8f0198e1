"""The answers that count as right in each task, and rows that are not questions."""

import json

import pytest

from difflm_jax import UserError
from difflm_jax.data.columns import parse_naming
from difflm_jax.evaluation.tasks import TASKS, read_questions
from difflm_jax.evaluation.tasks.gsm8k import final_number
from difflm_jax.sampling.text import Prompts
from tests.byte_tokenizer import byte_tokenizer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $18 every day.\n#### 18", 18),
        ("#### $1,234.50", 1234.5),
        ("first #### 3 then #### 4", 4),
        (r"so \boxed{-7} and not 8", -7),
        (r"\boxed{\$12}", 12),
        ("The answer is 42.", 42),
        ("It is 3-2", 2),
        ("3 - 2 = 1", 1),
        ("a loss of -5 dollars", -5),
        ("It costs $0.50.", 0.5),
        ("18.00", 18),
        ("no number at all", None),
        ("", None),
        ("9" * 5000, None),
        # the rest agrees with math-verify 0.9.0; a comment gives its result if it differs
        (r"\boxed{9{,}500}", 9500),
        ("It costs $9{,}500$.", 9500),
        ("#### 18 dollars in 3 days", 18),  # math-verify: 3
        ("The answer is **18**.", 18),
        (r"\boxed{12\text{ dollars}}, which is 3 less", 12),
        (r"\boxed{x = 18\ \mathrm{km}}", 18),
        (r"\text{Answer: } \boxed{1{,}250.75}", 1250.75),
        (r"\boxed{\dfrac{1}{2}}", 0.5),
        ("so 3/4 of them", 0.75),
        ("9\u202f500 in all", 9500),  # math-verify: 500
        ("1/0", None),  # math-verify: infinity
        (r"\boxed{9\,500}", 9500),  # math-verify: 0
        (r"\boxed{{9,500}}", 9500),  # math-verify: a set
        ("the numbers 5,7", 7),  # math-verify: 5.7
        ("a lakh is 1,00,000", 100000),  # math-verify: 1
    ],
)
def test_the_final_number_of_a_text(text, number):
    assert final_number(text) == number


ROWS = {
    "gsm8k": {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    "countdown": {"input": "30,100,93", "output": "23"},
    "sudoku": {"Puzzle": "3102200002100320", "Solution": "3142243142131324"},
    "exact": {"question": "The capital of Peru?", "answer": "The capital is Lima."},
    "contains": {"question": "The capital of Peru?", "answer": "Lima"},
}


@pytest.mark.parametrize(
    ("task", "text", "right"),
    [
        ("gsm8k", "The answer is 4.", True),
        ("gsm8k", "#### 4.0", True),
        ("gsm8k", "The answer is 5, not 4, so 5", False),
        ("countdown", "30 - (100 - 93)", True),
        ("countdown", "First 100 - 93 = 7.\n<answer>30 - (100 - 93)</answer>", True),
        ("countdown", "30 - (100 - 93) = 23", True),
        ("countdown", r"\boxed{30 + 93 - 100}", True),
        ("countdown", "23", False),  # uses none of the numbers
        ("countdown", "100 - 93 + 30 + 30 - 44", False),
        ("countdown", "30 * 100 - 93", False),
        ("countdown", "(((30 - 100", False),
        ("countdown", "9 ** 9 ** 9 ** 9", False),
        ("countdown", "30 / (100 - 100) + 93", False),
        ("countdown", "__import__('os').system('1 + 1')", False),
        ("countdown", "(" * 5000 + "1 + 1" + ")" * 5000, False),
        ("sudoku", "3 1 4 2\n2 4 3 1\n4 2 1 3\n1 3 2 4", True),
        ("sudoku", "3142243142131324", True),
        ("sudoku", "<answer>3142 2431 4213 1324</answer> of 2024", True),
        ("sudoku", "3142243142131342", False),  # a number twice in a column
        ("sudoku", "4321214334121234", False),  # valid, but not of this puzzle
        ("sudoku", "31422431", False),
        ("exact", "  the capital  is LIMA", True),
        ("exact", "The capital is Lima, I think.", False),
        ("contains", "The capital is Lima, I think.", True),
        ("contains", "The capital is Limassol.", False),
        ("contains", "", False),
    ],
)
def test_what_is_right(task, text, right):
    assert TASKS[task].is_correct(TASKS[task].question(ROWS[task]), text) is right


ASKED = {"role": "user", "content": "Is it warm?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}


def test_what_a_model_thinks_before_its_answer_is_not_compared():
    question = TASKS["exact"].question({"question": "What?", "answer": "It is warm."})
    assert TASKS["exact"].is_correct(question, "<think>\n\n</think>\n\nIt is warm.")
    assert not TASKS["exact"].is_correct(question, "It <think></think> is warm.")


def test_keys_of_questions_that_are_not_used_are_said_once(tmp_path, capsys):
    row = {"question": "Q", "answer": "A", "label": False}
    (tmp_path / "q.jsonl").write_text((json.dumps(row) + "\n") * 2)
    assert len(read_questions(str(tmp_path / "q.jsonl"))) == 2
    out = capsys.readouterr().out
    assert out.count("label is not used") == 1 and "(in 2)" in out


def test_a_question_is_asked_with_the_template_arguments_of_its_row():
    """Regression: they were reported as unused, so a row with `enable_thinking: false` was asked with thinking."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ style | default('plain') }}: {% endif %}"
    )
    row = {"question": "Q", "answer": "A", "chat_template_kwargs": {"style": "brief"}}
    asked = TASKS["exact"].question(row)
    prompts = Prompts(tokenizer, len(tokenizer), -1)
    expected = tokenizer.apply_chat_template(asked.messages, add_generation_prompt=True, style="brief", tokenize=False)
    assert expected == "Qbrief: "
    assert tokenizer.decode(prompts.prompt(asked.prompt)) == expected
    with pytest.raises(UserError, match=r"a prompt with keys is .*, not"):
        prompts.prompt({"messages": asked.messages, "style": "brief"})


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("exact", {"frage": "Q", "antwort": "A"}),
        ("exact", {"messages": [{"role": "Kunde", "content": "Q"}, {"role": "assistant", "content": "A"}]}),
        ("gsm8k", {"frage": "Q", "antwort": "#### 3"}),
    ],
)
def test_rows_with_own_names_are_questions(task, row, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = read_questions(
        str(tmp_path / "q.jsonl"), task=task, naming=parse_naming("question=frage, answer=antwort", "user=Kunde")
    )
    assert [message["content"] for message in question.messages] == ["Q"]


def test_a_question_keeps_the_tools_of_its_row():
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    row = {"messages": [ASKED, {"role": "assistant", "content": "Yes."}], "tools": tools}
    assert TASKS["exact"].question(row).prompt == {"messages": [ASKED], "tools": tools}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("gsm8k", {"question": "How many?", "answer": "four"}, "no '#### number'"),
        ("gsm8k", {"answer": "#### 4"}, "no text under 'question'"),
        ("countdown", {"input": "1,x", "output": "2"}, "not integers"),
        ("countdown", {"input": "1,2", "output": "2,3"}, "not one number"),
        ("sudoku", {"Puzzle": "123", "Solution": "3142243142131324"}, "not 16 digits 0-4"),
        ("sudoku", {"Puzzle": "3102200002100320", "Solution": "0142243142131324"}, "not 16 digits 1-4"),
        ("sudoku", ["3102200002100320"], "no text under 'Puzzle'"),
        ("exact", {"text": "plain"}, "no answer to compare with"),
        ("exact", {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "no text to"),
    ],
)
def test_a_row_that_is_no_question_is_named(task, row, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[task]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{message}"):
        read_questions(str(path), task=task)
    assert len(read_questions(str(path), rows=1, task=task)) == 1


@pytest.mark.parametrize(
    ("task", "file", "rows"),
    [
        ("gsm8k", "chat/gsm8k_test.jsonl", 1319),
        ("countdown", "reason/d1_countdown_cd3_test.jsonl", 256),
        ("sudoku", "reason/d1_4x4_test_sudoku.csv", 500),
    ],
)
def test_published_test_sets_are_read_and_their_own_solutions_are_right(task, file, rows, shared_data):
    questions = read_questions(str(shared_data / file), task=task)
    assert len(questions) == rows
    if task != "countdown":  # its rows have only the target
        assert all(TASKS[task].is_correct(question, question.reference) for question in questions)
