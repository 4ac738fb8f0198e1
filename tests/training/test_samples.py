"""Sample generations never end a run."""

from types import SimpleNamespace

from difflm_jax.training.samples import _prompts_and_answers


def test_prompts_that_leave_no_room_for_an_answer_are_passed_over():
    lm = SimpleNamespace(
        block_length=4,
        config=SimpleNamespace(max_position_embeddings=20),
        tokenizer=SimpleNamespace(decode=lambda tokens, skip_special_tokens: str(tokens)),
    )
    rows = [{"tokens": list(range(20)), "length": 20, "prompt_length": prompt} for prompt in (13, 12, 20, 0, 3, 2)]
    prompts, answers = _prompts_and_answers(lm, rows, 2, new_tokens=5)
    assert [len(prompt) for prompt in prompts] == [12, 3]
    assert answers == [str(list(range(12, 20))), str(list(range(3, 20)))]
