#!/usr/bin/env bash
# llguidance: an end-of-sequence token that consume_token accepts is not counted by rollback, so that undoing "b" and the
# end undoes "a", too; and validate_tokens refuses the end where the mask allows it and consume_token takes it.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 tokenizers==0.23.3 numpy
"$folder/env/bin/python" - <<'END'
import importlib.metadata

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

own = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
own.decoder = decoders.ByteLevel()
own.add_special_tokens([AddedToken("<end>", special=True)])
a, b, end = (own.token_to_id(text) for text in ("a", "b", "<end>"))
matcher = LLMatcher(LLTokenizer(own.to_str(), eos_token=end), LLMatcher.grammar_from_regex("ab"))


def allowed() -> list[int]:
    return np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")).tolist()


assert matcher.consume_tokens([a, b]) and allowed() == [end]
validated, taken = matcher.validate_tokens([end]), matcher.consume_token(end)
undone = matcher.rollback(2)  # the end and "b": "b" should be next
print("llguidance", importlib.metadata.version("llguidance"))
print(f"after 'ab' the mask allows only the end; validate_tokens: {validated}; consume_token: {taken}")
print(f"rollback(2) of 'a', 'b', end: {undone}; the next token may be {own.decode(allowed())!r}, not 'b'")
assert validated == 0 and taken and undone and allowed() == [a], "this has changed"
END
