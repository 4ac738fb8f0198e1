#!/usr/bin/env bash
# llguidance: the grammar of a JSON schema refuses spellings that are valid under the schema: properties in another
# order, and 1.0 for an integer.
# Seen: the declared order and 1 are accepted; the other order and 1.0 are not.
# Exit status: 0 where that is still so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 tokenizers==0.23.3 transformers==5.23.0 jsonschema
cd "$folder"
env/bin/python - <<'END'
import importlib.metadata, json
import jsonschema
import llguidance
import llguidance.hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
own = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate([*letters, "<eos>"])}, merges=[]))
own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
own.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>")
schema = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
    "additionalProperties": False,
}
grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
shared = llguidance.hf.from_tokenizer(tokenizer)
found = {}
for text in ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', '{"a": 1.0, "b": 2}'):
    jsonschema.validate(json.loads(text), schema)
    matcher = llguidance.LLMatcher(shared, grammar)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    found[text] = matcher.validate_tokens(tokens) == len(tokens)
print("llguidance", importlib.metadata.version("llguidance"))
print("accepted:", found)
assert list(found.values()) == [True, False, False], "this has changed"
END
