"""A small real tokenizer (bytes, ChatML) for machines without others."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Renders every role, tool calls and tools, as the templates of Qwen do.
CHATML = """{%- for tool in tools or [] %}{{- '<|im_start|>system\\n' + (tool | tojson) + '<|im_end|>\\n' }}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|mask|>")


def byte_tokenizer(
    merges: tuple[tuple[str, str], ...] = (), template: str | None = CHATML, eos: str | None = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """A token a byte, and one for each merge (in the byte-level alphabet, where a newline is Ċ and a space Ġ)."""
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in merges]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token="<|pad|>")
    tokenizer.chat_template = template
    return tokenizer
