"""Arithmetic questions are exact, stable, complete, and never both trained on and held out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.config import ArithmeticTask
from rlsys.errors import ConfigError
from rlsys.records import Prompt, Response
from rlsys.tasks.arithmetic import Arithmetic


def arithmetic(seed=0, **options):
    return Arithmetic(ArithmeticTask(name="arithmetic", **options), seed)


def test_training_and_evaluation_together_are_every_question_once():
    task = arithmetic(digits=1, eval_size=30, operators=("+", "-"))
    train = [task.train_item(index).text for index in range(task.size)]
    held_out = [item.text for item in task.eval_items()]
    assert len(held_out) == 30
    assert sorted(train + held_out) == sorted(f"{a}{o}{b}=" for a in range(10) for b in range(10) for o in "+-")


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32),
    operators=st.sets(st.sampled_from("+-*"), min_size=1),
    digits=st.integers(1, 30),
    operands=st.integers(2, 5),
    index=st.integers(0, 10**6),
)
def test_answers_are_what_python_computes(seed, operators, digits, operands, index):
    task = arithmetic(seed, operators=tuple(sorted(operators)), digits=digits, operands=operands, eval_size=5)
    item = task.train_item(index % task.size)
    assert item.answer == str(eval(item.text.removesuffix("=")))
    assert set(item.text + item.answer) <= set(task.alphabet())
    assert item.text not in {held_out.text for held_out in task.eval_items()}


def test_the_same_seed_gives_the_same_items_and_another_seed_others():
    def texts(seed):
        return [arithmetic(seed).train_item(index).text for index in range(20)]

    assert texts(1) == texts(1) != texts(2)


def test_operands_are_uniform_over_their_values():
    """Two digits: the mean of 0..99 is 49.5, its standard error over 2,000 operands 0.65."""
    task = arithmetic(digits=2)
    operands = [int(x) for i in range(1000) for x in task.train_item(i).text.rstrip("=").split("+")]
    assert min(operands) == 0
    assert max(operands) == 99
    assert abs(sum(operands) / 2000 - 49.5) < 3


def test_a_huge_space_costs_nothing_to_open():
    task = arithmetic(digits=40, operands=4)
    assert task.size == 10**160 - 512
    assert task.train_item(task.size - 1).text.count("+") == 3


def test_only_the_exact_finished_answer_scores():
    task = arithmetic()
    prompt = Prompt(epoch=0, index=0, text="12+7=", token_ids=(1,), answer="19")

    def score(text, finished=True):
        return task.score(prompt, Response(text=text, finished=finished))

    assert score("19") == 1.0
    assert [score(" 19"), score("190"), score("19.0"), score(""), score("19", finished=False)] == [0.0] * 5


def test_holding_out_everything_is_refused():
    assert arithmetic(digits=1, eval_size=99).size == 1
    with pytest.raises(ConfigError, match=r"task.eval_size=100: allowed: < 100"):
        arithmetic(digits=1, eval_size=100)


def test_a_repeated_operator_does_not_repeat_questions():
    assert arithmetic(operators=("+", "+")).size == 10_000 - 512
