"""The character model is an ordinary Hugging Face directory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlsys.errors import ConfigError
from rlsys.learning.tiny import make_tiny, make_tokenizer, unknown_characters
from tests.unit.learning.samples import ALPHABET

AWKWARD = "ab01 \n\t'.é€汉😀"


@pytest.fixture(scope="module")
def awkward(tmp_path_factory, tiny_config):
    path = tmp_path_factory.mktemp("awkward")
    make_tiny(tiny_config(), AWKWARD, path)
    return path


def test_plain_loaders_read_the_directory_back(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.config.vocab_size == len(tokenizer) == 2 + len(ALPHABET)
    assert tokenizer("12+7=").input_ids == [3, 4, 12, 9, 13], "one id per character, nothing added"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert GenerationConfig.from_pretrained(tiny).eos_token_id == 1


def test_reloaded_tokenizer_is_the_one_that_was_written(awkward):
    made, read = make_tokenizer(AWKWARD, 64), AutoTokenizer.from_pretrained(awkward)
    assert made.get_vocab() == read.get_vocab()
    for text in (AWKWARD, "a b  a\n\n b", "汉汉éé😀", "'a'b '"):
        assert made.encode(text) == read.encode(text)
        assert len(read.encode(text)) == len(text)
        assert read.decode(read.encode(text)) == text


@given(st.text(alphabet=AWKWARD, max_size=30))
def test_every_text_over_the_alphabet_survives_one_token_a_character(text):
    tokenizer = make_tokenizer(AWKWARD, 64)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert unknown_characters(tokenizer, text) == ""


def test_characters_outside_the_alphabet_are_named():
    assert unknown_characters(make_tokenizer(ALPHABET, 64), "1+2 =?") == " ?"


def test_end_token_decodes_to_nothing_when_special_tokens_are_skipped(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.decode([3, 4, 1], skip_special_tokens=True) == "12"
    assert tokenizer.decode([3, 4, 1]) == "12<eos>"


def test_the_seed_decides_the_weights(tmp_path, tiny_config):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_tiny(tiny_config(), ALPHABET, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_making_a_model_leaves_the_global_random_state_alone(tmp_path, tiny_config):
    before = torch.random.get_rng_state()
    make_tiny(tiny_config(), ALPHABET, tmp_path / "m", seed=5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_empty_alphabet_is_refused():
    with pytest.raises(ConfigError, match="alphabet is empty"):
        make_tokenizer("", 64)
