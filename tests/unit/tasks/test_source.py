"""The source gives every item once per epoch and continues exactly where it stopped."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.errors import CheckpointError
from rlsys.tasks import Item, PromptSource, Task


class Numbers(Task):
    def __init__(self, size):
        self.size = size

    def train_item(self, index):
        return Item(str(index), "")

    def eval_items(self):
        return []


def source(size=7, seed=0):
    return PromptSource(Numbers(size), lambda item: (f"<{item.text}>", (int(item.text),)), seed)


@given(size=st.integers(1, 40), seed=st.integers(0, 1000))
def test_each_epoch_is_a_permutation_of_the_items(size, seed):
    prompts = source(size, seed)
    for epoch in range(3):
        one_epoch = list(islice(prompts, size))
        assert sorted(prompt.token_ids[0] for prompt in one_epoch) == list(range(size))
        assert [(prompt.epoch, prompt.index) for prompt in one_epoch] == [(epoch, index) for index in range(size)]


@given(size=st.integers(1, 20), seed=st.integers(0, 1000), taken=st.integers(0, 60))
def test_a_restored_source_continues_the_uninterrupted_one(size, seed, taken):
    uninterrupted = source(size, seed)
    list(islice(uninterrupted, taken))
    restored = source(size, seed)
    restored.restore(uninterrupted.state())
    assert list(islice(restored, 30)) == list(islice(uninterrupted, 30))


def test_any_prompt_can_be_had_again_by_its_epoch_and_index():
    prompts = source()
    past = list(islice(prompts, 20))
    assert [prompts.prompt(prompt.epoch, prompt.index) for prompt in past] == past
    assert next(prompts).index == 20 % 7


def test_epochs_and_seeds_have_different_orders():
    prompts = list(islice(source(30, seed=0), 60))
    first, second = ([p.token_ids for p in prompts if p.epoch == epoch] for epoch in (0, 1))
    assert first != second
    assert first != [p.token_ids for p in islice(source(30, seed=1), 30)]


def test_a_prompt_carries_what_the_model_is_shown():
    prompt = next(source(1))
    assert (prompt.text, prompt.token_ids) == ("<0>", (0,))


@pytest.mark.parametrize(("size", "seed", "name"), [(8, 0, "size"), (7, 1, "seed")])
def test_the_state_of_another_run_is_refused(size, seed, name):
    with pytest.raises(CheckpointError, match=f"the checkpoint has {name}="):
        source(size, seed).restore(source().state())
