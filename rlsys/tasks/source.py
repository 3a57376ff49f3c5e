"""Training prompts without end, in an order that a checkpoint can continue."""

from collections.abc import Callable, Iterator, Mapping

from rlsys.errors import CheckpointError
from rlsys.records import Prompt
from rlsys.tasks.base import Item, Task
from rlsys.tasks.seeding import Permutation

Encode = Callable[[Item], tuple[str, tuple[int, ...]]]
"""The text shown to the model and its token ids."""


class PromptSource(Iterator[Prompt]):
    """Every training item once per epoch, each epoch in its own seeded order."""

    def __init__(self, task: Task, encode: Encode, seed: int) -> None:
        self._task, self._encode, self._seed = task, encode, seed
        self._epoch = self._index = 0

    def __next__(self) -> Prompt:
        """The next prompt; never raises StopIteration."""
        prompt = self.prompt(self._epoch, self._index)
        self._index += 1
        if self._index == self._task.size:
            self._epoch, self._index = self._epoch + 1, 0
        return prompt

    def prompt(self, epoch: int, index: int) -> Prompt:
        """The prompt at one place of one epoch, wherever the source stands: how a slot left open is opened again."""
        order = Permutation(self._task.size, self._seed, "epoch", epoch)
        return make_prompt(self._task.train_item(order(index)), self._encode, epoch=epoch, index=index)

    def state(self) -> dict[str, int]:
        """Where the source stands, as plain numbers."""
        return {"seed": self._seed, "size": self._task.size, "epoch": self._epoch, "index": self._index}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue exactly where `state` was taken. Raises CheckpointError if it is of another seed or task size."""
        for name, mine in (("seed", self._seed), ("size", self._task.size)):
            if state[name] != mine:
                raise CheckpointError(f"prompt source: the checkpoint has {name}={state[name]}, this run {mine}")
        self._epoch, self._index = state["epoch"], state["index"]


def make_prompt(item: Item, encode: Encode, *, epoch: int, index: int) -> Prompt:
    """The prompt of an item; held-out items become prompts of epoch 0 with their place in the list."""
    text, token_ids = encode(item)
    return Prompt(epoch=epoch, index=index, text=text, token_ids=token_ids, answer=item.answer, info=item.info)
