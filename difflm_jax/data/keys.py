"""All known keys of rows and messages: what each means, where it comes from, and what happens to it.

Every key that has a value is *used*, *announced* (once per data set, with the number of rows), or its row is *refused*.
A key that is in no table is announced. docs/compatibility.md is generated from these tables.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from difflm_jax.data.rows import RowError

USED, ANNOUNCED, REFUSED = "used", "announced", "refused"

_SHOWN = 20

Notes = Counter[str]  # what is announced, with the number of rows

OPENAI = "https://platform.openai.com/docs/guides/supervised-fine-tuning"
SHAREGPT = "https://llamafactory.readthedocs.io/en/latest/getting_started/data_preparation.html"
ALPACA = "https://github.com/tatsu-lab/stanford_alpaca"
LLAMA_FACTORY = SHAREGPT
AXOLOTL = "https://docs.axolotl.ai/docs/dataset-formats/conversation.html"
TRL = "https://huggingface.co/docs/trl/dataset_formats"
TRANSFORMERS = "https://huggingface.co/docs/transformers/chat_templating"
HERMES = "https://huggingface.co/datasets/NousResearch/hermes-function-calling-v1"
DOLLY = "https://huggingface.co/datasets/databricks/databricks-dolly-15k"
SQUAD = "https://huggingface.co/datasets/rajpurkar/squad"
MMLU = "https://huggingface.co/datasets/cais/mmlu"
ORCA = "https://huggingface.co/datasets/Open-Orca/OpenOrca"
DEEPSEEK = "https://api-docs.deepseek.com/guides/reasoning_model"
AGENT_INSTRUCT = "https://huggingface.co/datasets/THUDM/AgentInstruct"
GPT_OSS = "https://cookbook.openai.com/articles/openai-harmony"


@dataclasses.dataclass(frozen=True)
class Key:
    """How a key is treated. `effect` describes it in words and is part of the announcement."""

    use: str
    effect: str
    source: str


# Keys of a row, in addition to those that determine its format (`difflm_jax.data.formats.FORMATS`).
ROW_KEYS = {
    "tools": Key(USED, "functions for the chat template; a list, or the JSON of one", TRANSFORMERS),
    "functions": Key(USED, "the older name of tools", OPENAI),
    "system": Key(USED, "the system message, if the conversation has none", LLAMA_FACTORY),
    "system_prompt": Key(USED, "the system message, if the conversation has none", ORCA),
    "history": Key(USED, "earlier turns, a list of [question, answer]", LLAMA_FACTORY),
    "chat_template_kwargs": Key(USED, "arguments of the chat template", TRL),
    "input": Key(USED, "follows the prompt after an empty line", ALPACA),
    "context": Key(USED, "precedes a question and follows an instruction, with an empty line", f"{DOLLY}, {SQUAD}"),
    "choices": Key(USED, "lines 'A. …' under the question", MMLU),
    "options": Key(USED, "lines 'A. …' under the question", "https://huggingface.co/datasets/GBaker/MedQA-USMLE-4-options"),
    "images": Key(REFUSED, "the model reads text only", LLAMA_FACTORY),
    "image": Key(REFUSED, "the model reads text only", TRL),
    "videos": Key(REFUSED, "the model reads text only", LLAMA_FACTORY),
    "video": Key(REFUSED, "the model reads text only", LLAMA_FACTORY),
    "audios": Key(REFUSED, "the model reads text only", LLAMA_FACTORY),
    "audio": Key(REFUSED, "the model reads text only", OPENAI),
    "label": Key(ANNOUNCED, "undesired answers are trained like the others", TRL),
    "kto_tag": Key(ANNOUNCED, "undesired answers are trained like the others", LLAMA_FACTORY),
    "rejected": Key(ANNOUNCED, "preferences are not trained", TRL),
    "chosen": Key(ANNOUNCED, "preferences are not trained", TRL),
    "documents": Key(ANNOUNCED, "not given to the chat template", TRANSFORMERS),
    "parallel_tool_calls": Key(ANNOUNCED, "not given to the chat template", OPENAI),
}  # fmt: skip

# Keys of a message or turn.
MESSAGE_KEYS = {
    "role": Key(USED, "the speaker", OPENAI),
    "from": Key(USED, "the speaker", SHAREGPT),
    "speaker": Key(USED, "the speaker", AXOLOTL),
    "content": Key(USED, "the text, or a list of typed parts", OPENAI),
    "value": Key(USED, "the text", SHAREGPT),
    "text": Key(USED, "the text", AXOLOTL),
    "tool_calls": Key(USED, "calls of functions", OPENAI),
    "function_call": Key(USED, "the older form of tool_calls", OPENAI),
    "tool_call_id": Key(USED, "given to the chat template", OPENAI),
    "name": Key(USED, "given to the chat template; announced if it does not show it", OPENAI),
    "reasoning_content": Key(USED, "the thought; announced if the chat template does not show it", DEEPSEEK),
    "reasoning": Key(USED, "the thought; announced if the chat template does not show it", TRANSFORMERS),
    "thinking": Key(USED, "the thought; announced if the chat template does not show it", GPT_OSS),
    "weight": Key(USED, "0: the answer is context and is not trained; other than 0 and 1: refused", OPENAI),
    "train": Key(USED, "false: the answer is context and is not trained", AXOLOTL),
    "training": Key(USED, "false: the answer is context and is not trained", AXOLOTL),
    "loss": Key(USED, "false: the answer is context and is not trained", AGENT_INSTRUCT),
    "train_detail": Key(REFUSED, "parts of an answer cannot be left out", AXOLOTL),
    "images": Key(REFUSED, "the model reads text only", LLAMA_FACTORY),
    "image": Key(REFUSED, "the model reads text only", TRL),
    "audio": Key(REFUSED, "the model reads text only", OPENAI),
    "refusal": Key(REFUSED, "it takes the place of a content", OPENAI),
}


def is_given(value: Any) -> bool:
    """Whether a key has a value. Null and empty values count as absent; 0 and false do not."""
    return value is not None and not (isinstance(value, (str, list, tuple, Mapping)) and not value)


def account(row: Mapping[str, Any], used: Collection[str], notes: Notes | None) -> None:
    """Announces each key of `row` that has a value and is not `used`. Raises `RowError` for one that is refused."""
    for key in row:
        if key not in used and is_given(row[key]):
            known = ROW_KEYS.get(key)
            if known is not None and known.use == REFUSED:
                raise RowError(f"has {key}: {known.effect}")
            effect = f" ({known.effect})" if known is not None and known.use == ANNOUNCED else ""
            note(notes, f"{key} is not used{effect}")


def account_message(message: Mapping[str, Any], where: str, notes: Notes | None) -> None:
    """Announces each key of `message` that has a value and no use. Raises `RowError` for one that is refused."""
    for key in message:
        known = MESSAGE_KEYS.get(key)
        if not is_given(message[key]) or (known is not None and known.use == USED):
            continue
        if known is not None and known.use == REFUSED:
            raise RowError(f"{where} has {key}: {known.effect}")
        note(notes, f"{key} of messages is not used")


def note(notes: Notes | None, what: str) -> None:
    """Counts the announcement `what`, a clause. Does nothing if `notes` is None."""
    if notes is not None:
        notes[what] += 1


def announcement(notes: Notes) -> str:
    """Lists `notes` in one line, the most frequent first; empty if there are none."""
    listed = [f"{what} (in {count})" for what, count in notes.most_common(_SHOWN)]
    more = len(notes) - len(listed)
    return ", ".join(listed) + (f", and {more} more" if more > 0 else "")
