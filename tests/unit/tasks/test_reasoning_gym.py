"""Real reasoning-gym datasets: disjoint, stable, picklable, and scored by their own scorers."""

import pickle

import pytest

from rlsys.config import ReasoningGymTask
from rlsys.errors import ConfigError, RewardError
from rlsys.records import Response
from rlsys.tasks import make_prompt
from rlsys.tasks.containment import harmless
from rlsys.tasks.reasoning_gym import ReasoningGym

SMALL_SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def gym(dataset, seed=0, size=40, eval_size=20, **options):
    config = ReasoningGymTask(name="reasoning_gym", dataset=dataset, options=options, size=size, eval_size=eval_size)
    return ReasoningGym(config, seed)


def score(task, item, text, finished=True):
    prompt = make_prompt(pickle.loads(pickle.dumps(item)), lambda item: (item.text, (1,)), epoch=0, index=0)
    return task.score(prompt, Response(text=text, finished=finished))


@pytest.mark.parametrize("dataset", ["chain_sum", "countdown", "string_insertion", "n_queens", "simple_integration"])
def test_the_datasets_own_answer_scores_one_and_a_cut_off_one_zero(dataset):
    task = gym(dataset)
    for item in [task.train_item(3), *task.eval_items()]:
        assert score(task, item, item.answer) == 1.0
        assert score(task, item, item.answer, finished=False) == 0.0


def test_countdown_gives_partial_credit_for_another_number_made_from_the_same_ones():
    task = gym("countdown")
    item = task.train_item(0)
    numbers = item.info["entry"]["metadata"]["numbers"]
    assert score(task, item, "*".join(map(str, numbers))) == 0.05
    assert score(task, item, "no idea") == 0.0


def test_training_questions_are_never_held_out_even_in_a_small_space():
    task = gym("chain_sum", size=200, eval_size=40, **SMALL_SUMS)
    held_out = {item.text for item in task.eval_items()}
    train = [task.train_item(index).text for index in range(200)]
    assert not held_out & set(train)


def test_holding_out_most_of_a_space_is_refused():
    task = gym("chain_sum", eval_size=2000, **SMALL_SUMS)
    with pytest.raises(ConfigError, match=r"task.eval_size=2000: that holds out most questions of 'chain_sum'"):
        task.train_item(0)


def test_items_do_not_depend_on_the_order_they_are_asked_for():
    forwards, backwards = gym("chain_sum", seed=5), gym("chain_sum", seed=5)
    expected = [forwards.train_item(index) for index in range(10)]
    assert [backwards.train_item(index) for index in reversed(range(10))] == expected[::-1]
    assert gym("chain_sum", seed=6).train_item(0) != expected[0]


def test_neighbouring_seeds_share_no_stream():
    """The library seeds item i with seed + i, so that seeds 0 and 1 would give the same items one place apart."""
    tasks = [gym("chain_sum", seed=seed, min_digits=4, max_digits=6) for seed in (0, 1)]
    texts = [{task.train_item(index).text for index in range(40)} for task in tasks]
    assert not texts[0] & texts[1]


def test_alphabet_covers_questions_and_answers():
    task = gym("chain_sum")
    items = [task.train_item(0), task.train_item(39), *task.eval_items()]
    assert {c for item in items for c in item.text + item.answer} <= set(task.alphabet())
    assert task.alphabet() == "".join(sorted(task.alphabet()))


def test_an_unknown_dataset_names_its_neighbours():
    with pytest.raises(ConfigError, match=r"task.dataset='chainsum' is not in reasoning-gym; nearest: chain_sum"):
        gym("chainsum")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": 2}, r"task.options.terms: 'chain_sum' takes .*min_terms"),
        ({"seed": 2}, r"task.options.seed: 'chain_sum' takes"),
        ({"min_terms": -1}, r"task.options=.*min_terms must be positive"),
        ({"min_terms": "two"}, r"task.options=.*'chain_sum' refused them"),
    ],
)
def test_refused_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        ReasoningGym(ReasoningGymTask(name="reasoning_gym", dataset="chain_sum", options=options), 0)


def test_a_composite_is_built_from_plain_options():
    parts = [{"name": "chain_sum", "weight": 1, "config": {}}, {"name": "countdown", "weight": 1, "config": {}}]
    task = gym("composite", datasets=parts)
    assert {item.info["entry"]["metadata"]["source_dataset"] for item in task.eval_items()} == {
        "chain_sum",
        "countdown",
    }
    assert all(score(task, item, item.answer) == 1.0 for item in task.eval_items())


def test_a_response_the_scorer_cannot_read_is_wrong():
    task = gym("prime_factorization")  # its scorer raises ValueError on words
    assert score(task, task.train_item(0), "hello") == 0.0


def test_a_scorer_that_cannot_read_its_own_answer_is_an_error():
    task = gym("prime_factorization")
    item = task.train_item(0)
    item.info["entry"]["answer"] = "not factors"
    with pytest.raises(RewardError, match="raised on its own answer 'not factors'"):
        score(task, item, "hello")


@pytest.mark.parametrize(
    "dataset",
    [
        *("binary_matrix", "spiral_matrix", "string_insertion", "n_queens"),
        *("countdown", "puzzle24", "simple_integration", "intermediate_integration", "polynomial_multiplication"),
    ],
)
def test_what_a_model_wrote_is_never_run(dataset, tmp_path):
    task = gym(dataset, size=1, eval_size=1)
    target = tmp_path / "written"
    for attack in (
        f"open({str(target)!r}, 'w')",
        f"[open({str(target)!r}, 'w')]",
        f"S(\"open({str(target)!r}, 'w')\")",
    ):
        assert score(task, task.train_item(0), attack) <= 0.01
    assert not target.exists()


def test_only_plain_mathematics_reaches_a_parser_of_code():
    assert harmless("countdown", "(82 + 20)*67 - 50/2")
    assert not harmless("countdown", "9**9**9**9")
    assert harmless("simple_integration", "-9*x**8/10 + 3*sin(X) + C")
    assert not harmless("simple_integration", "x.__class__")
    assert not harmless("simple_integration", "exec(chr(65))")
    assert harmless("chain_sum", "open('x')")  # compared as text, never parsed
