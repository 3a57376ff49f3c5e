"""Prompts go through the chat template exactly when they should, and must fit the context."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlsys.errors import ConfigError, DataError
from rlsys.tasks import Item, check_lengths, make_encoder, make_prompt

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
CHAT = Item("", "", {"messages": [{"role": "system", "content": "2"}, {"role": "user", "content": "1"}]})


def tokenizer(template=None):
    vocabulary = {character: number for number, character in enumerate("0123456789+=;usa")}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)


@pytest.mark.parametrize(
    ("template", "chat", "text", "token_ids"),
    [
        (None, None, "1+2=", (1, 10, 2, 11)),
        (None, False, "1+2=", (1, 10, 2, 11)),
        (TEMPLATE, False, "1+2=", (1, 10, 2, 11)),
        (TEMPLATE, None, "u1+2=;a", (13, 1, 10, 2, 11, 12, 15)),
        (TEMPLATE, True, "u1+2=;a", (13, 1, 10, 2, 11, 12, 15)),
    ],
)
def test_the_template_is_applied_if_asked_for_or_there(template, chat, text, token_ids):
    assert make_encoder(tokenizer(template), chat)(Item("1+2=", "3")) == (text, token_ids)


def test_a_chat_item_is_rendered_message_by_message():
    assert make_encoder(tokenizer(TEMPLATE), None)(CHAT) == ("s2;u1;a", (14, 2, 12, 13, 1, 12, 15))


def test_a_template_that_is_needed_but_missing_or_forbidden_is_an_error():
    with pytest.raises(ConfigError, match=r"task.chat=True: the tokenizer has no chat template"):
        make_encoder(tokenizer(), True)
    with pytest.raises(ConfigError, match=r"task.chat=None: .*chat messages.*it has none"):
        make_encoder(tokenizer(), None)(CHAT)
    with pytest.raises(ConfigError, match=r"task.chat=False: .*chat messages"):
        make_encoder(tokenizer(TEMPLATE), False)(CHAT)


def test_a_prompt_that_does_not_fit_is_named_with_its_length():
    encode = make_encoder(tokenizer(), None)
    prompts = [make_prompt(Item(text, ""), encode, epoch=0, index=i) for i, text in enumerate(["1+2=", "11+22="])]
    check_lengths(prompts, max_context=10, max_new_tokens=4)
    with pytest.raises(DataError, match=r"prompt 1 of epoch 0 \('11\+22='\) has 6 tokens; allowed: 1..5"):
        check_lengths(prompts, max_context=9, max_new_tokens=4)


def test_an_empty_prompt_is_refused():
    with pytest.raises(DataError, match="has 0 tokens"):
        check_lengths(
            [make_prompt(Item("", ""), lambda _: ("", ()), epoch=0, index=0)], max_context=9, max_new_tokens=4
        )
