"""Tests tokenizers rebuilt from GGUF metadata, token by token, against transformers' and real ones."""

import json
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from difflm_jax.checkpoint.gguf.tokenizer import build_tokenizer
from difflm_jax.checkpoint.source import open_source
from difflm_jax.errors import UserError
from tests.checkpoint.gguf_files import add_tokenizer, write_gguf

TEXTS = [
    "Hello, world! I'm 42 years old; you'll be 1234567.",
    "  two  spaces,\ttabs\n\n\nand lines \r\n end  ",
    "naïve café — élan, Ünïcödé ßharp, ΑΒΓ αβγ",
    "decomposed: e\u0301 a\u0308; ligature ﬁ; ½ ² ٣ 五百",
    "日本語のテキスト、한국어 텍스트, текст",
    "🙂🙃 👩‍👩‍👧 emoji",
    "def f(x):\n    return x**2  # 3.14159\n",
    "<s>marked</s> <think>plain</think> x<pad>y",
    "don't DON'T we'LL it's'",
    "",
    " ",
    "\n",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<think>", "</think>"]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def trained() -> dict:
    """Returns tokens, types and merges of a byte-level BPE trained on a little text, special tokens first."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    # without a splitter, merges cross words and digits, which reveals a wrong pre-tokenizer
    core.train_from_iterator([text for text in TEXTS for _ in range(9)] + ["12 345 6789"] * 9, trainer)
    model = json.loads(core.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED] * 2 + [TokenType.NORMAL] * (len(tokens) - 5)
    return {"tokens": tokens, "types": [int(kind) for kind in types], "merges": [" ".join(m) for m in model["merges"]]}


@pytest.fixture
def written(tmp_path, tiny_model, trained):
    """`written(**keys)`: a GGUF file with the trained tokenizer and these `tokenizer.ggml.*` keys."""

    def write(template: str | None = TEMPLATE, **keys) -> Path:
        keys = {"padding_token_id": 0, **keys}

        def metadata(writer: GGUFWriter) -> None:
            add_tokenizer(writer, **{**trained, **keys})
            if template:
                writer.add_chat_template(template)

        return write_gguf(tmp_path / "model.gguf", tiny_model("llama", vocab_size=640), metadata=metadata)

    return write


def ours_of(path: Path):
    return open_source(str(path)).load_tokenizer()


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe"])
def test_ids_are_those_of_transformers(pre, written):
    path = written(pre=pre, add_bos_token=False)
    ours, theirs = ours_of(path), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    core = theirs.backend_tokenizer
    if pre == "smollm":  # transformers drops the digit rule
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), core.pre_tokenizer]
        )
    if pre == "llama-bpe":  # and that a whole word needs no merges, which Llama 3's own tokenizer.json says
        core.model.ignore_merges = True
    texts = [text.replace("e\u0301", "e").replace("a\u0308", "a") if pre == "qwen2" else text for text in TEXTS]
    for text in texts:  # (nor does transformers normalise for qwen2; the real tokenizer below does)
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == text


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe"])
def test_ids_survive_being_saved(pre, written, tmp_path):
    ours = ours_of(written(pre=pre))
    ours.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [again(text).input_ids for text in TEXTS] == [ours(text).input_ids for text in TEXTS]
    assert again.chat_template == TEMPLATE
    assert again.special_tokens_map == ours.special_tokens_map


# llama.cpp's own spelling of the rules, which has no classes of upper and lower case.
LLAMA_CPP = {
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
        r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
}


@pytest.mark.parametrize("pre", LLAMA_CPP)
def test_text_is_split_as_llama_cpp_splits_it(pre, written):
    ours = ours_of(written(pre=pre, add_bos_token=False)).backend_tokenizer.pre_tokenizer
    theirs = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA_CPP[pre]), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    for text in ["camelCaseAND snake_Case HTTPServer", "Hello, world! I'm 42; 1234567", "a/b//\n\nc", *TEXTS]:
        if text.isascii():  # beyond ASCII, llama.cpp's rule for tekken is coarser than Mistral's own
            assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), text


def test_the_rule_of_files_that_name_none_cuts_numbers_and_punctuation(written, capsys):
    named = ours_of(written(pre="default"))
    ours = named.backend_tokenizer.pre_tokenizer
    unnamed = ours_of(written(pre=None))  # an old conversion: llama.cpp warns and uses the same rule
    assert [unnamed(text).input_ids for text in TEXTS] == [named(text).input_ids for text in TEXTS]
    assert capsys.readouterr().out.count("has no tokenizer.ggml.pre; text is split as llama.cpp does without it") == 1
    pieces = [piece for piece, _ in ours.pre_tokenize_str("ab, 12345 (c)")]
    assert pieces == ["ab", ",", "Ġ", "123", "45", "Ġ", "(", "c", ")"]


def test_distilled_qwen_is_split_as_qwen2(written):
    ids = [[ours_of(written(pre=pre))(text).input_ids for text in TEXTS] for pre in ("qwen2", "deepseek-r1-qwen")]
    assert ids[0] == ids[1]


def test_the_three_splitters_differ(written):
    ids = {pre: [ours_of(written(pre=pre))(text).input_ids for text in TEXTS] for pre in ("smollm", "qwen2")}
    assert ids["smollm"] != ids["qwen2"]


def test_only_qwen2_composes_characters(written):
    for pre in ("smollm", "qwen2", "llama-bpe"):
        ours = ours_of(written(pre=pre))
        assert (ours("e\u0301").input_ids == ours("é").input_ids) == (pre == "qwen2"), pre


def test_a_whole_word_needs_no_merges_in_llama_3(written, trained):
    tokens, types = [*trained["tokens"], "zqzqz"], [*trained["types"], int(TokenType.NORMAL)]
    assert ours_of(written(pre="llama-bpe", tokens=tokens, types=types))("zqzqz").input_ids == [1, len(tokens) - 1]
    assert len(ours_of(written(pre="smollm", tokens=tokens, types=types))("zqzqz").input_ids) > 1


def test_special_tokens_and_template(written):
    ours = ours_of(written(mask_token_id=4, unknown_token_id=3))
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "<pad>")
    assert (ours.mask_token, ours.unk_token) == ("</think>", "<think>")
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<s>hi</s>"
    ours = ours_of(written(template=None, padding_token_id=None))
    assert (ours.chat_template, ours.pad_token, ours.mask_token) == (None, None, None)
    ids = ours("<s>a<think>").input_ids
    assert ids[0] == 1 and ids[-1] == 3
    assert ours.decode(ids, skip_special_tokens=True) == "a<think>"  # <think> is user-defined, not special


@pytest.mark.parametrize(
    ("pre", "keys", "before", "after"),
    [
        ("smollm", {}, [], []),
        ("smollm", {"add_bos_token": True}, [1], []),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ("llama-bpe", {}, [1], []),  # llama.cpp adds it by default
        ("llama-bpe", {"add_bos_token": False}, [], []),
    ],
)
def test_bos_and_eos_around_a_text(pre, keys, before, after, written):
    ours = ours_of(written(pre=pre, **keys))
    bare = ours("abc", add_special_tokens=False).input_ids
    assert ours("abc").input_ids == before + bare + after


def test_unused_tokens_at_the_end_are_free_rows(written, trained):
    padded = trained["tokens"] + [f"[PAD{i}]" for i in range(9)]
    types = trained["types"] + [int(TokenType.UNUSED)] * 9
    ours = ours_of(written(tokens=padded, types=types))
    assert len(ours) == len(trained["tokens"])
    assert len(ours("[PAD3]").input_ids) > 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
        (
            {"pre": "falcon"},
            "tokenizer.ggml.pre 'falcon' is not supported",
        ),
        ({"eos_token_id": 9999}, "tokenizer.ggml.eos_token_id=9999 is not one of the"),
        ({"merges": ["a b c"]}, "tokenizer.ggml.merges has 'a b c'"),
        ({"merges": ["a zzz"]}, "tokenizer.ggml.merges has 'a zzz'"),
        ({"merges": ["! ~"]}, "tokenizer.ggml.merges has '! ~'"),
        ({"types": [1, 1]}, "tokenizer.ggml.tokens and tokenizer.ggml.token_type do not match"),
        ({"tokens": ["a", "a"], "types": [1, 1], "merges": []}, "tokenizer.ggml.tokens holds a token twice"),
    ],
)
def test_what_cannot_be_built_is_named(keys, message, written):
    source = open_source(str(written(**keys)))
    with pytest.raises(UserError) as caught:
        source.load_tokenizer()
    assert message in str(caught.value)
    assert "model.gguf" in str(caught.value)


# ---- real tokenizers


def real_lines(shared_data: Path, count: int) -> list[str]:
    files = ["chat/gsm8k_test.jsonl", "pretrain/wikitext2_test.txt", "pretrain/c4_demo.jsonl", "eval/mbpp.jsonl"]
    files += ["chat/tau_bench_airline_messages.jsonl", "pretrain/tinystories_sample.txt"]
    lines = []
    for file in files:
        text = (shared_data / file).read_text(encoding="utf-8")
        lines += [line[:2000] for line in text.splitlines() if line.strip()][: count // 3]
    hard = (shared_data / "qwen_tokenizer/vectors/ggml-vocab-qwen2.gguf.inp").read_text(encoding="utf-8")
    return lines + hard.split("\n__ggml_vocab_test__\n")


class QwenMetadata:
    """The keys that llama.cpp's converter writes for a real `tokenizer.json` of 151,936 embedding rows."""

    path = Path("qwen.gguf")

    def __init__(self, file: Path):
        content = json.loads(file.read_text(encoding="utf-8"))
        tokens = [f"[PAD{i}]" for i in range(151936)]
        types = [int(TokenType.UNUSED)] * len(tokens)
        for token, index in content["model"]["vocab"].items():
            tokens[index], types[index] = token, int(TokenType.NORMAL)
        for added in content["added_tokens"]:
            kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
        self._values = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
            "tokenizer.ggml.eos_token_id": 151645,
            "tokenizer.ggml.padding_token_id": 151643,
        }

    def get(self, key: str):
        return self._values.get(key)


@pytest.mark.slow
def test_the_real_qwen_tokenizer_id_for_id(shared_data):
    """1,000 real lines and llama.cpp's hard cases give the ids of Qwen's own tokenizer; id 151669 stays free."""
    theirs = AutoTokenizer.from_pretrained(shared_data / "qwen_tokenizer")
    ours = build_tokenizer(QwenMetadata(shared_data / "qwen_tokenizer" / "tokenizer.json"))
    assert len(ours) == len(theirs) == 151669
    lines = [*real_lines(shared_data, 1000), *TEXTS, "<|im_start|>user\n<think>\n</think><|im_end|>"]
    assert len(lines) > 1000
    for line in lines:
        assert ours(line).input_ids == theirs(line).input_ids, line


class SentencePieceMetadata:
    """The keys that llama.cpp's converter would write for a SentencePiece tokenizer.json: pieces and scores."""

    def __init__(self, path: Path):
        self.path = path
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        tokens = sorted(vocabulary, key=vocabulary.get)
        scores = dict.fromkeys(tokens, -1e6)
        for rank, merge in reversed([*enumerate(content["model"]["merges"])]):
            scores["".join(merge if isinstance(merge, list) else merge.split(" "))] = -float(rank)
        kinds = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}
        types = [TokenType.BYTE if t.startswith("<0x") else kinds.get(t, TokenType.NORMAL) for t in tokens]
        self._values = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [int(kind) for kind in types],
            "tokenizer.ggml.scores": [scores[token] for token in tokens],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }

    def get(self, key: str):
        return self._values.get(key)


def test_a_real_sentencepiece_tokenizer_id_for_id(shared_data):
    """As for Llama 2: a space before the text, bytes for characters without a piece, bos by default."""
    path = shared_data / "stories260K" / "tokenizer.json"
    theirs, ours = Tokenizer.from_file(str(path)), build_tokenizer(SentencePieceMetadata(path))
    for line in [*real_lines(shared_data, 300), *TEXTS[:7], "Once upon a time, there was a 火."]:
        ids = ours(line).input_ids
        assert ids[1:] == theirs.encode(line, add_special_tokens=False).ids, line
        assert ids[0] == 1 and ours.decode(ids[1:]) == theirs.decode(ids[1:], skip_special_tokens=False)


@pytest.mark.slow
@pytest.mark.usefixtures("read_once")
def test_the_real_smollm2_tokenizer_id_for_id(shared_data, smollm2):
    """1,000 real lines give the ids of transformers' tokenizer, with the digit rule restored that it drops."""
    ours, theirs = ours_of(smollm2), AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    lines = [*real_lines(shared_data, 1000), *TEXTS]
    without_digits = sum(ours(line).input_ids != theirs(line).input_ids for line in lines)
    core = theirs.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), core.pre_tokenizer])
    for line in lines:
        assert ours(line).input_ids == theirs(line).input_ids, line
        assert ours.decode(ours(line).input_ids) == line
    assert without_digits > 0
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    messages = [{"role": "user", "content": "7 + 5?"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
