"""From items to token ids, through the chat template where there is one."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rlsys.errors import ConfigError, DataError
from rlsys.records import Prompt
from rlsys.tasks.base import Item
from rlsys.tasks.source import Encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_encoder(tokenizer: "PreTrainedTokenizerBase", chat: bool | None) -> Encode:
    """Encoder of items. chat: True applies the tokenizer's template, False never, None if there is one.

    Raises ConfigError if a template is asked for, here or by an item that is a chat, and may not or cannot be used.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ConfigError("task.chat=True: the tokenizer has no chat template; allowed: False, or None (if it has one)")
    templated = has_template and chat is not False

    def encode(item: Item) -> tuple[str, tuple[int, ...]]:
        if not templated:
            if "messages" in item.info:
                raise ConfigError(
                    f"task.chat={chat}: the prompt {item.text!r:.80} is a list of chat messages, which needs the "
                    "tokenizer's chat template" + ("" if has_template else ", and it has none")
                )
            return item.text, tuple(tokenizer.encode(item.text))
        messages = item.info.get("messages", [{"role": "user", "content": item.text}])
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))  # type: ignore[arg-type]
        return text, tuple(tokenizer.encode(text, add_special_tokens=False))  # the template wrote them

    return encode


def check_lengths(prompts: Iterable[Prompt], *, max_context: int, max_new_tokens: int) -> None:
    """Raise DataError for the first prompt that is empty, or that with its response would not fit the context."""
    for prompt in prompts:
        length, room = len(prompt.token_ids), max_context - max_new_tokens
        if not 0 < length <= room:
            raise DataError(
                f"prompt {prompt.index} of epoch {prompt.epoch} ({prompt.text!r:.60}) has {length} tokens; "
                f"allowed: 1..{room} (model.max_context={max_context} less rollout.max_new_tokens={max_new_tokens})"
            )
