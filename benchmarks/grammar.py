"""Cost and validity of decoding with a grammar: a causal model, lookup drafts and a canvas, with and without it.

    python benchmarks/grammar.py [--model=models/SmolLM2-135M-Instruct.Q4_1.gguf --tokens=48 --rounds=3]

The ways take turns on the same prompts, after a round that compiles. Without a grammar an answer may be longer or
shorter, so the figure is seconds per forward pass. Every constrained answer is validated, and at temperature 0 lookup
drafts must give the tokens of plain decoding: the command fails otherwise.
"""

import argparse
import json
import re
import statistics

from benchmarks.common import add_report_flags, alternating, report
from difflm_jax import Grammar, load

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
DATE = r"\d{4}-\d{2}-\d{2}"
PROMPTS = (
    "Describe a person as JSON with name, age and city.",
    "Invent a customer of a bakery, as JSON.",
    "When did the first moon landing happen? Answer with a date.",
    "Give me a record of a patient as JSON.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--draws", type=int, default=0, help="draws at temperature 1 that are validated, too")
    parser.add_argument("--dtype", default="float32")
    add_report_flags(parser, rounds=3)
    options = parser.parse_args()
    causal = load(options.model, causal=True, dtype=options.dtype)
    canvas = load(options.model, attention="block", block_length=4, logit_shift=True, dtype=options.dtype)
    schema, date = Grammar.json_schema(SCHEMA), Grammar.regex(DATE)
    lookup = {"algorithm": "speculative", "strategy": "lookup"}
    settings = {
        "causal": (causal, {}),
        "causal, schema": (causal, {"grammar": schema}),
        "causal, date": (causal, {"grammar": date}),
        "lookup": (causal, lookup),
        "lookup, schema": (causal, {**lookup, "grammar": schema}),
        "blocks of 4": (canvas, {"algorithm": "probability"}),
        "blocks of 4, date": (canvas, {"algorithm": "probability", "grammar": date}),
        "blocks of 4, schema": (canvas, {"algorithm": "left_to_right", "grammar": schema}),
    }
    answers = {}

    def way(name: str):
        lm, arguments = settings[name]

        def run(_: int) -> None:
            answers[name] = lm.generate(list(PROMPTS), options.tokens, options.tokens, batch_size=4, **arguments)

        return run

    seconds = alternating({name: way(name) for name in settings}, options.rounds)
    rows = []
    for name, taken in seconds.items():
        passes, valid = int(answers[name].steps.max()), "-"
        if "grammar" in settings[name][1]:
            found = [is_valid(name, text) for text in answers[name].texts]
            valid = f"{sum(found)}/{len(found)}"
            assert all(found) and answers[name].complete.all(), (name, answers[name].texts)
        figures = {"ms_a_pass": 1000 * statistics.median(taken) / passes, "passes": passes, "valid": valid}
        rows.append({"way": name, **figures, "seconds": taken})
    for plain, drafted in (("causal", "lookup"), ("causal, schema", "lookup, schema")):
        pairs = zip(answers[plain].tokens, answers[drafted].tokens, strict=True)
        assert all(a.tolist() == b.tolist() for a, b in pairs), (plain, drafted)
    if options.draws:
        prompts = [PROMPTS[0]] * options.draws
        out = causal.generate(prompts, options.tokens, options.tokens, temperature=1.0, batch_size=50, grammar=schema)
        found = sum(is_valid("schema", text) for text in out.texts)
        rows.append({"way": "draws, schema", "valid": f"{found}/{options.draws}", "ms_a_pass": 0.0, "seconds": []})
        assert found == options.draws
    report("grammar", options, rows, "ms_a_pass")
    print("causal, schema:", json.dumps(answers["causal, schema"].texts[0]))
    print("causal, date:", json.dumps(answers["causal, date"].texts[2]))


def is_valid(name: str, text: str) -> bool:
    """Whether an answer matches the grammar of a way."""
    if name.endswith("date"):
        return re.fullmatch(DATE, text) is not None
    try:
        value = json.loads(text)
    except ValueError:
        return False
    kinds = {"name": str, "age": int, "city": str}
    return isinstance(value, dict) and {name: type(value.get(name)) for name in value} == kinds


if __name__ == "__main__":
    main()
