"""What a task is: questions to train on, held-out questions, and a score for a response."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from rlsys.errors import ConfigError
from rlsys.records import Prompt, Response


@dataclass(frozen=True, slots=True)
class Item:
    """One question as plain, picklable data.

    `info` is whatever the task's scorer needs beside `answer`. The key `messages`, if present, is a chat
    (a list of `{"role", "content"}`) that replaces `text` as what the model is shown.

    >>> Item("12+7=", "19").answer
    '19'
    """

    text: str
    answer: str
    info: Mapping[str, object] = field(default_factory=dict)


class Task(ABC):
    """Base of all tasks. Yours says its `size` and gives its items; the rest has defaults.

    `size` is the number of training items. `train_item` must be stable: the same index is the same item in
    every process. `chat` says whether prompts go through the tokenizer's chat template (None: if it has one).
    """

    size: int
    chat: bool | None = None

    @abstractmethod
    def train_item(self, index: int) -> Item:
        """Training item `index`, 0 <= index < size."""

    @abstractmethod
    def eval_items(self) -> list[Item]:
        """The held-out items; none of them is a training item."""

    def score(self, prompt: Prompt, response: Response) -> float:
        """1.0 if the response ended by itself and is the answer up to surrounding whitespace, else 0.0."""
        return float(response.finished and response.text.strip() == prompt.answer.strip())

    def alphabet(self) -> str:
        """Every character of the task, sorted: the vocabulary of a character tokenizer. Reads all items.

        Raises ConfigError when the task is a chat, which needs a tokenizer with a template.
        """
        items = [*map(self.train_item, range(self.size)), *self.eval_items()]
        if self.chat or any("messages" in item.info for item in items):
            raise ConfigError(
                "model.path=None: a chat needs a tokenizer with a chat template; name a model that has one"
            )
        return "".join(sorted({character for item in items for character in item.text + item.answer}))
