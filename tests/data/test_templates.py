"""Tests that training sees the prompts of generation with templates that move a prompt or open a thought."""

from typing import Any

import pytest

from difflm_jax.data.chat import encode_prompt, encode_rendered
from difflm_jax.data.formats import parse_row
from difflm_jax.data.keys import Notes
from difflm_jax.data.rows import RowError
from difflm_jax.data.templates import render_answers
from tests.byte_tokenizer import byte_tokenizer
from tests.data.cases import case_ids, cases
from tests.data.test_rows import messages_of

CASES = cases("templates")

# How Mistral 7B Instruct v0.3 places the system text: in the last user turn, if that ends the conversation.
MISTRAL = """{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}
{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}{{- '<s>' }}{%- for m in turns %}{%- if m.role == 'user' %}
{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}
{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}{%- else %}{{- ' ' + m.content | trim + '</s>' }}
{%- endif %}{%- endfor %}"""
TURNS = (
    "{%% for m in messages %%}{%% if m.role == 'user' %%}{{ '<|User|>' + m.content }}{%% else %%}%s{%% endif %%}"
    "{%% endfor %%}"
)
ASK = "{%% if add_generation_prompt %%}{{ '<|Assistant|>%s' }}{%% endif %%}"
SAY = "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '</s>' }}"
CALL = "{{ '<|Assistant|>' + m.tool_calls[0].function.name + ' ' + %s + '</s>' }}"
TEMPLATES = {
    "mistral": MISTRAL,
    # DeepSeek-R1-Distill: thoughts are removed from answers, and the generation prompt opens one.
    "r1": "<s>" + TURNS % SAY + ASK % r"<think>\n",
    "nothink": TURNS % "{{ '<|Assistant|>' + m.content + '</s>' }}" + ASK % r"<think>\n\n</think>\n\n",
    "added arguments": TURNS % (CALL % "m.tool_calls[0].function.arguments") + ASK % "",
    "printed arguments": TURNS % (CALL % "m.tool_calls[0].function.arguments | string") + ASK % "",
    "thinking": TURNS % "{{ '<|Assistant|>(' + m.thinking + ')' + m.content + '</s>' }}" + ASK % "",
    "arguments": "{{ style + ' ' }}" + TURNS % SAY + ASK % "",
}


@pytest.mark.parametrize("case", CASES, ids=case_ids(CASES))
def test_what_a_template_shows_is_trained_after_the_prompt_of_generation(case: Any) -> None:
    tokenizer = byte_tokenizer(template=TEMPLATES[case.options["template"]], eos="</s>")
    right = case.right if isinstance(case.right[0], list) else [case.right]
    notes = Notes()
    _, conversation = parse_row({"messages": messages_of(case.given)} | case.options.get("row", {}))
    texts = render_answers(tokenizer, conversation, case.options.get("answers", "last"), notes)
    assert [list(pieces) for pieces in texts] == right
    assert list(notes) == ([case.options["announced"]] if "announced" in case.options else [])
    if "row" not in case.options:  # the oracle of the prompt is transformers' own rendering
        prompt = messages_of(case.given)[:-1]
        generated = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        encoded = encode_rendered(tokenizer, texts)[-1]
        assert "".join(right[-1][:-1]) == generated
        assert (
            encoded.tokens[: len(encode_prompt(tokenizer, prompt))].tolist()
            == encode_prompt(tokenizer, prompt).tolist()
        )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        # SmolVLM's and Idefics' templates read a list of parts, and ignore plain text.
        (TURNS % "{{ '<|Assistant|></s>' }}" + ASK % "", "shows nothing of the answer"),
        (
            (TURNS % SAY).replace("'<|User|>' + m.content", "'<|User|>'") + ASK % "",
            "leaves out message 0 of role 'user'",
        ),
        ("{{ messages[-1].content }}" + ASK % "", "and the answer is not found in it"),
    ],
)
def test_a_template_that_hides_a_message_is_refused(template: str, reason: str) -> None:
    tokenizer = byte_tokenizer(template=template, eos="</s>")
    _, conversation = parse_row({"question": "What?", "answer": "That."})
    with pytest.raises(RowError, match=reason):
        render_answers(tokenizer, conversation, "last")
