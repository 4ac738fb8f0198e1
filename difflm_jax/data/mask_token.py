"""Chooses the mask token: a free embedding row or a reserved token. The embedding is never resized."""

from typing import Any

from difflm_jax.errors import UserError

DEFAULT_MASK_TOKEN = "<|mask|>"

# Tokens that model families reserve and that chat data does not contain, in order of preference.
_RESERVED = (
    *("<file_sep>", "<|reserved_special_token_0|>", "<|fim_pad|>", "<unused0>", "[control_8]", "<reserved_0>"),
    *("<mask>", "[MASK]"),
)


def token_of_id(tokenizer: Any, token_id: int | None) -> str:
    """The token with that id, or "" if the id is None or the tokenizer has no such token."""
    if token_id is None or not 0 <= token_id < len(tokenizer):
        return ""
    return tokenizer.convert_ids_to_tokens(token_id) or ""


def choose_mask_token(tokenizer: Any, embedding_rows: int, override: str = "") -> int:
    """Returns the id of the mask token and sets `tokenizer.mask_token`, so that a saved tokenizer names it.

    In order of preference: `override`, the tokenizer's own mask token, `<|mask|>` on the first embedding row that the
    tokenizer leaves free (151669 for Qwen3, as in SDAR and dLLM), a reserved token, and the unknown token. Raises
    `UserError` for a token without an embedding row, or one that is the padding or end-of-sequence token.
    """
    vocabulary = tokenizer.get_vocab()
    free_row = len(tokenizer) if len(tokenizer) < embedding_rows else None
    token = override or tokenizer.mask_token
    if not token:
        candidates = [t for t in (DEFAULT_MASK_TOKEN,) if t in vocabulary or free_row is not None]
        candidates += [t for t in (*_RESERVED, tokenizer.unk_token) if t in vocabulary]
        if not candidates:
            raise UserError(
                f"mask_token: the embedding has no free row (all {embedding_rows} are tokens) and no reserved token is "
                "known; name a token that your data does not hold with mask_token, or add one: "
                "tokenizer.add_tokens('<mask>', special_tokens=True), model.resize_token_embeddings(len(tokenizer))"
            )
        token = candidates[0]
    if token not in vocabulary and free_row is None:
        raise UserError(f"mask_token: {token!r} is no token and the embedding's {embedding_rows} rows are all taken")
    tokenizer.add_special_tokens({"mask_token": token})
    mask_token_id = tokenizer.mask_token_id
    if mask_token_id >= embedding_rows:
        raise UserError(f"mask_token: {token!r} has id {mask_token_id}, but the embedding has {embedding_rows} rows")
    for role, other in (("end-of-sequence", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        if mask_token_id == other:
            raise UserError(f"mask_token: {token!r} is the {role} token; name another with mask_token")
    return mask_token_id
