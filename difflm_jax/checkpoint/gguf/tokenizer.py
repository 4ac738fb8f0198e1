"""Rebuilds the tokenizer of a .gguf file with the `tokenizers` library.

`transformers` reads it only if torch is installed, and drops the digit rule of `smollm`.
"""

from pathlib import Path
from typing import Any, Protocol

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from difflm_jax.checkpoint.gguf.sentencepiece import sentencepiece_tokenizer
from difflm_jax.errors import UserError

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# Mistral's: words are split before a capital.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's fallback, applied in this order.
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
# A word that is a token skips merges; bos is added first unless the file says otherwise.
_WHOLE_WORDS = ("llama-bpe", "tekken")


class Metadata(Protocol):
    """The part of a file that is needed: its path, and its values by key (None for a missing key)."""

    path: Path

    def get(self, key: str) -> Any: ...


def build_tokenizer(metadata: Metadata) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of a file, with chat template and special ids: SentencePiece or byte-level BPE.

    Raises `UserError` that names the kind of tokenizer, or its `pre`, if it is not supported.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    tokens, types = _tokens(metadata)
    if kind == "gpt2" and not pre:
        pre = "default"
        print(
            f"{metadata.path}: has no tokenizer.ggml.pre; text is split as llama.cpp does without it, which may not be "
            "how the model was trained: a file of a newer conversion has the key",
            flush=True,
        )
    if kind == "llama":
        scores = metadata.get("tokenizer.ggml.scores") or ()
        if len(scores) < len(tokens):
            raise UserError(f"{metadata.path}: tokenizer.ggml.tokens and tokenizer.ggml.scores do not match")
        space_prefix = metadata.get("tokenizer.ggml.add_space_prefix") is not False
        tokenizer = sentencepiece_tokenizer(tokens, types, scores[: len(tokens)], space_prefix)
    else:
        tokenizer = _byte_level(metadata, kind, pre, tokens)
    special_kinds = (TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind in special_kinds, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (*special_kinds, TokenType.USER_DEFINED)
        ]
    )

    special = {name: _named_token(metadata, key, tokens) for name, key in _SPECIAL_TOKENS.items()}
    special = {name: token for name, token in special.items() if token is not None}
    _add_bos_and_eos(metadata, tokenizer, special, add_bos_by_default=kind == "llama" or pre in _WHOLE_WORDS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(metadata: Metadata, kind: str | None, pre: str | None, tokens: list[str]) -> Tokenizer:
    """Returns byte-level BPE from tokens and merges, with the pre-tokenizer that `tokenizer.ggml.pre` names."""
    path = metadata.path
    if kind != "gpt2":
        raise UserError(f"{path}: tokenizer.ggml.model {kind!r} is not supported (known: gpt2, llama)")
    if pre not in _SPLITTERS:
        raise UserError(f"{path}: tokenizer.ggml.pre {pre!r} is not supported (known: {', '.join(_SPLITTERS)})")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    if bad := [merge for merge in merges if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys()]:
        raise UserError(f"{path}: tokenizer.ggml.merges has {' '.join(bad[0])!r}, which joins no two tokens to a third")

    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_SPLITTERS[pre]())
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
    "mask_token": "mask_token_id",
}


def _split(*patterns: str) -> list[pre_tokenizers.PreTokenizer]:
    return [
        *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


_SPLITTERS = {
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ],
    "qwen2": lambda: _split(_QWEN2),
    "deepseek-r1-qwen": lambda: _split(_QWEN2),
    "llama-bpe": lambda: _split(_LLAMA3),
    "tekken": lambda: _split(_TEKKEN),
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "default": lambda: _split(*_DEFAULT),
}


def _tokens(metadata: Metadata) -> tuple[list[str], list[int]]:
    """Returns the tokens and their types, without unused ones that pad the list to the rows of the embedding."""
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not tokens or types is None or len(types) != len(tokens):
        raise UserError(f"{metadata.path}: tokenizer.ggml.tokens and tokenizer.ggml.token_type do not match")
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{metadata.path}: tokenizer.ggml.tokens holds a token twice")
    end = len(tokens)
    while end and types[end - 1] == TokenType.UNUSED:
        end -= 1
    return tokens[:end], types[:end]


def _named_token(metadata: Metadata, key: str, tokens: list[str]) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{key}")
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise UserError(f"{metadata.path}: tokenizer.ggml.{key}={index} is not one of the {len(tokens)} tokens")
    return tokens[index]


def _add_bos_and_eos(
    metadata: Metadata, tokenizer: Tokenizer, special: dict[str, str], add_bos_by_default: bool
) -> None:
    """Adds bos before and eos after a text if the file says so. By default, llama.cpp adds bos to some kinds."""
    add_bos = metadata.get("tokenizer.ggml.add_bos_token")
    wanted = {
        "bos_token": add_bos_by_default if add_bos is None else add_bos,
        "eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token")),
    }
    around = {name: special[name] for name, add in wanted.items() if add and name in special}
    if around:
        template = [around.get("bos_token"), "$A", around.get("eos_token")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(part for part in template if part),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in around.values()],
        )
