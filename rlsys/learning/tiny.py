"""A small Qwen2 made from scratch, one token per character, as an ordinary Hugging Face directory."""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from rlsys.config.schema import TinyModelConfig
from rlsys.errors import ConfigError
from rlsys.learning.policy import quiet

PAD, EOS = "<pad>", "<eos>"


def make_tokenizer(alphabet: str, max_length: int) -> PreTrainedTokenizerBase:
    """One token per character of `alphabet`, after `<pad>` (0) and `<eos>` (1).

    It is Qwen2's own byte-level BPE with a vocabulary of single characters, because `AutoTokenizer` gives a
    Qwen2 directory that class whatever the directory asks for. A character of several UTF-8 bytes is merged
    from them. Other characters have no token and vanish: check texts with `unknown_characters`.

    >>> make_tokenizer("0123456789+=", 32)("12+7=").input_ids
    [3, 4, 12, 9, 13]
    """
    vocabulary = {PAD: 0, EOS: 1}
    merges: list[tuple[str, str]] = []
    for character in dict.fromkeys(alphabet):
        symbols = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character)[0][0]
        vocabulary.setdefault(symbols[0], len(vocabulary))
        for i in range(1, len(symbols)):
            vocabulary.setdefault(symbols[i], len(vocabulary))
            if symbols[: i + 1] not in vocabulary:
                merges.append((symbols[:i], symbols[i]))
                vocabulary[symbols[: i + 1]] = len(vocabulary)
    if len(vocabulary) == 2:
        raise ConfigError("the task's alphabet is empty: a character tokenizer needs at least one character")
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        pad_token=PAD,
        eos_token=EOS,
        unk_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def unknown_characters(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The characters of `text` that the tokenizer would lose; empty for almost every text."""
    if tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text:
        return ""
    encoded = {c: tokenizer.encode(c, add_special_tokens=False) for c in text}
    return "".join(c for c, ids in encoded.items() if tokenizer.decode(ids) != c)


def make_tiny(tiny: TinyModelConfig, alphabet: str, path: Path, *, seed: int = 0) -> None:
    """Write a randomly initialised Qwen2 and its character tokenizer to `path`.

    `transformers` and vLLM both load the directory as it is; `generation_config.json` names the end token.
    """
    tokenizer = make_tokenizer(alphabet, tiny.max_positions)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.intermediate_size,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        num_key_value_heads=tiny.kv_heads,
        max_position_embeddings=tiny.max_positions,
        tie_word_embeddings=tiny.tie_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    with quiet():
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
