"""Rebuilds SentencePiece BPE of a .gguf file (Llama 2, Gemma) from its scored pieces, with the `tokenizers` library."""

from collections.abc import Sequence

from gguf import TokenType
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

_SPACE = "▁"
_WITHOUT_PARTS = (TokenType.CONTROL, TokenType.UNUSED, TokenType.BYTE, TokenType.UNKNOWN)


def sentencepiece_tokenizer(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], space_prefix: bool
) -> Tokenizer:
    """Returns byte-fallback BPE over text with "▁" for spaces; `space_prefix` adds one before the text.

    SentencePiece joins the pair whose result has the highest score, so merges are sorted by score.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), "<unk>")
    tokenizer = Tokenizer(
        models.BPE(vocabulary, _merges(vocabulary, types, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    decoded = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), tokenizer.normalizer])
        decoded.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(decoded)
    return tokenizer


def _merges(vocabulary: dict[str, int], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    found = []
    for piece, index in vocabulary.items():
        if types[index] in _WITHOUT_PARTS:
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(scores[index], *pair) for pair in pairs]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]
