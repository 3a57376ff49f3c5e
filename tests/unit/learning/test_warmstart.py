"""The supervised phase is a function of its inputs, cached whole, and leaves something to learn."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.config.schema import ModelConfig, WarmstartConfig
from rlsys.errors import DataError
from rlsys.learning import warmstart
from rlsys.learning.policy import load_policy, load_tokenizer
from rlsys.learning.warmstart import ensure_warmstart


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


@dataclass
class Copy:
    """`n=` is answered by n: learnt in a few steps."""

    size: int = 60
    letters: str = "0123456789="

    def train_item(self, index: int) -> Question:
        return Question(f"{index}=", str(index))

    def alphabet(self) -> str:
        return self.letters


@pytest.fixture
def model(tmp_path, tiny_config):
    def make(**options) -> ModelConfig:
        section: dict[str, Any] = {"steps": 6, "batch_size": 16, "lr": 5e-3, "cache_dir": tmp_path / "cache"} | options
        return ModelConfig(tiny=tiny_config(), warmstart=WarmstartConfig(**section), max_context=16)

    return make


@torch.no_grad()
def accuracy(path, items, max_new_tokens: int = 4) -> float:
    """Share of items whose greedy answer is exact and ends by itself."""
    network, tokenizer = load_policy(path, "float32").model, load_tokenizer(path)
    correct = 0
    for item in items:
        ids = tokenizer.encode(item.text)
        said: list[int] = []
        while len(said) < max_new_tokens and 1 not in said:
            said.append(int(network(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
        correct += said == [*tokenizer.encode(item.answer), 1]
    return correct / len(items)


def test_a_second_call_finds_the_first_ones_result(model):
    steps: list[int] = []
    first = ensure_warmstart(model(), Copy(), 0, lambda step, total, loss: steps.append(step))
    assert steps == [1, 2, 3, 4, 5, 6]
    written = {p.name: p.stat().st_mtime_ns for p in first.iterdir()}
    second = ensure_warmstart(model(), Copy(), 0, lambda *_: pytest.fail("trained again"))
    assert second == first
    assert {p.name: p.stat().st_mtime_ns for p in second.iterdir()} == written


def test_everything_it_depends_on_has_a_place_of_its_own(model, tmp_path, tiny_config, monkeypatch):
    made = [
        ensure_warmstart(model(), Copy(), 0),
        ensure_warmstart(model(), Copy(), 1),
        ensure_warmstart(model(), Copy(size=61), 0),
        ensure_warmstart(model(), Copy(letters="0123456789=+"), 0),
        ensure_warmstart(model(steps=7), Copy(), 0),
        ensure_warmstart(model(label_noise=0.5), Copy(), 0),
        ensure_warmstart(model().model_copy(update={"tiny": tiny_config(tie_embeddings=False)}), Copy(), 0),
    ]
    monkeypatch.setattr(warmstart, "RECIPE", -1)
    made.append(ensure_warmstart(model(), Copy(), 0))
    assert len(set(made)) == len(made)


def test_the_cache_is_found_again_from_another_place(model, tmp_path):
    here = ensure_warmstart(model(), Copy(), 0)
    there = ensure_warmstart(model(cache_dir=tmp_path / "elsewhere"), Copy(), 0)
    assert here.name == there.name, "where the cache lies is not part of what it holds"


def test_the_same_inputs_give_the_same_bytes(model, tmp_path):
    a = ensure_warmstart(model(cache_dir=tmp_path / "a", label_noise=0.3), Copy(), 5)
    b = ensure_warmstart(model(cache_dir=tmp_path / "b", label_noise=0.3), Copy(), 5)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_an_interrupted_phase_leaves_nothing_to_be_found(model, tmp_path):
    def interrupt(step: int, total: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_warmstart(model(), Copy(), 0, interrupt)
    assert list((tmp_path / "cache").iterdir()) == []
    assert (ensure_warmstart(model(), Copy(), 0) / "model.safetensors").is_file()


def test_it_learns_answers_and_when_to_stop(model):
    items = [Copy().train_item(i) for i in range(10)]
    task = Copy(size=10)
    short, long = (ensure_warmstart(model(steps=steps), task, 0) for steps in (1, 120))
    assert accuracy(short, items) == 0.0
    assert accuracy(long, items) == 1.0
    assert accuracy(long, items, max_new_tokens=1) == 0.0, "an answer without its end is not exact"


def test_partly_wrong_answers_leave_a_model_that_knows_more_than_it_says(model):
    items = [Copy().train_item(i) for i in range(10)]
    good, spoilt = (ensure_warmstart(model(steps=120, label_noise=noise), Copy(size=10), 0) for noise in (0.0, 0.8))
    assert accuracy(good, items) == 1.0
    assert accuracy(spoilt, items) <= 0.8


def test_label_noise_changes_the_last_character_of_that_share_of_answers_and_nothing_else():
    questions = [[i] for i in range(2000)]
    answers = [np.asarray([7, 2 + i % 10, 1], dtype=np.int32) for i in range(2000)]
    same_questions, noisy = warmstart._corrupt((questions, answers), 0.3, 0)
    wrong = [i for i in range(2000) if noisy[i].tolist() != answers[i].tolist()]
    assert same_questions == questions
    assert len(wrong) / 2000 == pytest.approx(0.3, abs=0.03)
    assert all(noisy[i].tolist() == [7, 2 + (i + 1) % 10, 1] for i in wrong)
    assert [a.tolist() for a in warmstart._corrupt((questions, answers), 0.0, 0)[1]] == [a.tolist() for a in answers]


def test_every_epoch_visits_every_item_once():
    order = warmstart._epochs(10, 35, 0).tolist()
    assert [sorted(order[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert order[:10] != order[10:20]
    assert max(Counter(order).values()) == 4


def test_items_that_cannot_be_learnt_are_named(model, tiny_config):
    with pytest.raises(DataError, match="lacks '9'"):
        ensure_warmstart(model(), Copy(letters="012345678="), 0)
    narrow = ModelConfig(tiny=tiny_config(), warmstart=model().warmstart, max_context=5)
    with pytest.raises(DataError, match="'10=' has 6 tokens"):
        ensure_warmstart(narrow, Copy(), 0)


def test_a_large_task_is_sampled(model, monkeypatch):
    monkeypatch.setattr(warmstart, "POOL", 50)
    asked: list[int] = []

    class Large(Copy):
        def train_item(self, index: int) -> Question:
            asked.append(index)
            return Question(f"{index % 10}=", str(index % 10))

    ensure_warmstart(model(), Large(size=10**9), 0)
    assert 0 < len(asked) <= 50
    assert max(asked) > 10**6
