"""The table of drafts gives the same number of passes for every strategy as its loop."""

import pytest

from difflm_jax.evaluation.lossless import draft_table, passes, print_lossless, strategies
from difflm_jax.sampling.causal import drafting_of
from difflm_jax.sampling.drafts import STRATEGIES
from difflm_jax.sampling.options import Sampling
from tests.sampling.test_speculative import PROMPTS, TOKENS, drafter
from tests.tiny_checkpoint import save_tiny_model


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """Every noise row has the mask token, so that the table and the loops draw the same noise."""
    return drafter(save_tiny_model(tmp_path_factory.mktemp("model"))).with_diffusion(noise="mask")


@pytest.fixture(scope="module")
def table(lm):
    rows = lm.prompts.all(PROMPTS)
    return draft_table(lm, rows, lm.base().generate(PROMPTS, max_new_tokens=TOKENS).tokens, 3)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lookup", [True, False])
def test_the_table_knows_the_passes_of_every_loop(lm, table, strategy, lookup):
    if strategy == "lookup" and not lookup:
        pytest.skip("this strategy is lookup")
    out = lm.generate(PROMPTS, max_new_tokens=TOKENS, strategy=strategy, lookup=lookup)
    drafting = drafting_of(lm.diffusion, Sampling(strategy=strategy, lookup=lookup))
    assert drafting.beside == (8 if lookup and strategy in ("one_pass", "likeliest") else 0)
    assert [passes(row, drafting) for row in table] == out.steps.tolist()


def test_the_report_says_what_is_saved_and_that_the_text_is_the_same(lm, capsys):
    found = print_lossless(lm, PROMPTS, 8, 4)
    assert found["different_rows"] == []
    assert set(found["tokens_per_pass"]) == {"base", *strategies(3)}
    assert found["decoded_tokens_per_pass"] == pytest.approx(found["tokens_per_pass"]["one_pass m=3 + lookup"])
    assert "rows that differ from the base: 0 of 4" in capsys.readouterr().out
