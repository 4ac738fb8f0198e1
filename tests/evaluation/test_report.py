"""The table of right answers: its ways of decoding, and the printed output."""

import dataclasses

import pytest

import difflm_jax
from difflm_jax.evaluation.report import Decodings, compare, print_report
from difflm_jax.evaluation.tasks import Question
from difflm_jax.view.tables import print_table
from tests.tiny_checkpoint import save_tiny_model

QUESTIONS = [Question([{"role": "user", "content": f"{i}?"}], "ab") for i in range(3)]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    directory = save_tiny_model(tmp_path_factory.mktemp("model"))
    return difflm_jax.load(directory, attention="prefix", logit_shift=True, dtype="float32")


def test_a_line_has_the_same_weights_decoded_causally(lm):
    """Not the base: the adapter stays on. An answer may be right when decoded causally and wrong with masks."""
    columns = compare(lm, QUESTIONS, Decodings([2], 4, causally=True))
    assert [column.name for column in columns] == ["causal base", "2 tokens a pass", "causally"]
    same = dataclasses.replace(lm, diffusion=lm.diffusion.causal())
    assert columns[2].answers == same.generate([question.prompt for question in QUESTIONS], 4, 4).texts
    assert len(compare(lm, QUESTIONS, Decodings([2], 4))) == 2


def test_as_many_answers_are_printed_as_asked_for(lm, capsys):
    for shown, printed in ((0, 0), (1, 1), (3, 3)):
        print_report(lm, "rows", QUESTIONS, Decodings([4], 4), shown)
        assert capsys.readouterr().out.count("Q: ") == printed


def test_a_table_in_a_log_breaks_no_line_and_reads_no_markup(capsys):
    print_table(["way", "95 %"], [["x" * 120, "[0.10, 0.20]"], ["[bold]", "-"]])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("x" * 120) and line.endswith("[0.10, 0.20]") for line in lines)
    assert any(line.startswith("[bold]") for line in lines)
