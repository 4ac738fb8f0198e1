"""Tests which token becomes the mask, and which ones are refused."""

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from difflm_jax.data.mask_token import choose_mask_token
from difflm_jax.errors import UserError
from tests.byte_tokenizer import byte_tokenizer


def without_mask():
    """Returns a tokenizer of 256 bytes and three special tokens, none of them a mask."""
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    fresh = type(backend)(backend.model)
    fresh.add_special_tokens([AddedToken(token, special=True) for token in ("<|pad|>", "<|im_start|>", "<|im_end|>")])
    return type(tokenizer)(tokenizer_object=fresh, eos_token="<|im_end|>", pad_token="<|pad|>")


def test_a_free_embedding_row_becomes_the_mask():
    tokenizer = without_mask()
    count = len(tokenizer)
    assert choose_mask_token(tokenizer, count + 5) == count
    assert tokenizer.mask_token == "<|mask|>"
    assert tokenizer("a<|mask|>b")["input_ids"][1] == count


def test_a_token_of_that_name_is_taken_as_it_is():
    tokenizer = byte_tokenizer()
    assert choose_mask_token(tokenizer, len(tokenizer)) == tokenizer.convert_tokens_to_ids("<|mask|>")


def test_the_tokenizers_own_mask_token_comes_first():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|im_start|>"})
    assert choose_mask_token(tokenizer, 300) == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_the_choice_survives_saving(tmp_path):
    tokenizer = without_mask()
    chosen = choose_mask_token(tokenizer, 300)
    tokenizer.save_pretrained(tmp_path)
    assert choose_mask_token(AutoTokenizer.from_pretrained(tmp_path), 300) == chosen


def test_a_full_table_without_a_reserved_token_is_refused():
    tokenizer = without_mask()
    with pytest.raises(UserError, match="no free row"):
        choose_mask_token(tokenizer, len(tokenizer))


def test_a_mask_token_that_only_the_vocabulary_names_is_found():
    tokenizer = without_mask()
    tokenizer.add_tokens("<mask>", special_tokens=True)
    assert choose_mask_token(tokenizer, len(tokenizer)) == len(tokenizer) - 1
    assert tokenizer.mask_token == "<mask>"


@pytest.mark.parametrize(("token", "why"), [("<|im_end|>", "end-of-sequence"), ("<|pad|>", "padding")])
def test_eos_and_padding_are_refused(token, why):
    with pytest.raises(UserError, match=why):
        choose_mask_token(byte_tokenizer(), 300, token)


def test_a_token_that_would_need_a_larger_table_is_refused():
    tokenizer = without_mask()
    with pytest.raises(UserError, match="rows are all taken"):
        choose_mask_token(tokenizer, len(tokenizer), "<mine>")
    with pytest.raises(UserError, match="embedding has 100 rows"):
        choose_mask_token(byte_tokenizer(), 100)


def test_qwen3_takes_the_first_row_behind_its_tokens(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "qwen_tokenizer")
    assert choose_mask_token(tokenizer, 151936) == 151669


def test_smollm2_has_no_free_row_and_takes_a_reserved_token(smollm2):
    from difflm_jax.checkpoint.source import open_source

    tokenizer = open_source(str(smollm2)).load_tokenizer()
    assert choose_mask_token(tokenizer, 49152) == tokenizer.convert_tokens_to_ids("<file_sep>") == 5
