"""Every number a run reports has one definition, and every definition is reported by somebody."""

from pathlib import Path

import pytest

from rlsys.config.schema import AdvantageConfig, KLConfig, LearnerConfig, ModelConfig, ObjectiveConfig, TinyModelConfig
from rlsys.observability import reference
from rlsys.observability.catalogue import CATALOGUE, PARTS, definition
from tests.fakes import FakeProbe, make_config, make_prompt
from tests.rig import Rig


def test_names_are_unique_and_say_unit_and_meaning() -> None:
    for name, metric in CATALOGUE.items():
        assert name == metric.name
        assert metric.unit
        assert metric.meaning
        assert not {"by_staleness", "by_sign"} & set(name.split("/"))
    from rlsys.observability import catalogue

    assert len(catalogue._METRICS) == len(CATALOGUE)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("reward/mean", "reward/mean"),
        ("importance/k3/by_staleness/4+", "importance/k3"),
        ("importance/clip_fraction/by_sign/negative", "importance/clip_fraction"),
    ],
)
def test_a_restricted_name_has_the_definition_of_the_whole(key: str, name: str) -> None:
    assert definition(key) is CATALOGUE[name]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "reward",
        "reward/median",
        "reward/mean/by_staleness/0",  # not reported by staleness
        "importance/k3/by_staleness/5",
        "importance/k3/by_staleness/",
        "importance/k3/by_sign/positive",
        "importance/clip_fraction/by_sign/0",
        "importance/k3/by_staleness/0/by_staleness/0",
        "reward/mean\n",
    ],
)
def test_a_name_nobody_defined_is_an_error(key: str) -> None:
    with pytest.raises(KeyError):
        definition(key)


def learner_keys(directory: Path) -> set[str]:
    """What a real step of a real, small learner reports, with everything on that reports more."""
    import numpy as np
    import torch

    from rlsys.learning.learner import Learner
    from rlsys.learning.tiny import make_tiny
    from rlsys.records import GroupScore, RolloutGroup, ScoredGroup
    from tests.fakes import make_rollout

    torch.set_num_threads(1)
    tiny = TinyModelConfig(hidden_size=16, layers=2, heads=2, kv_heads=1, intermediate_size=16, max_positions=32)
    make_tiny(tiny, "0123456789", directory)
    learner = Learner(
        directory,
        model=ModelConfig(),
        learner=LearnerConfig(),
        objective=ObjectiveConfig.model_validate({"correction": "tis"}),
        advantage=AdvantageConfig(),
        kl=KLConfig(coef=0.1),
        temperature=1.0,
        staleness_max=4,
        max_new_tokens=4,
    )
    groups = [
        RolloutGroup(
            slot=slot,
            attempt=1,
            worker="a",
            prompt=make_prompt(slot + 2),
            rollouts=tuple(make_rollout([0, 0], sample) for sample in range(2)),
            started_at=0.0,
            finished_at=1.0,
        )
        for slot in range(2)
    ]
    rewards = np.array([0.0, 1.0], dtype=np.float32)
    scored = [
        ScoredGroup(group=group, score=GroupScore(slot=group.slot, attempt=1, rewards=rewards, scored_at=2.0))
        for group in groups
    ]
    reference = [np.full(2, -2.0, dtype=np.float32)] * 4
    return set(learner.update(scored, reference).step.metrics)


def test_what_is_reported_is_defined_and_what_is_defined_is_reported(tmp_path: Path) -> None:
    rig = Rig(make_config(tmp_path, "audit.every=1"), eval_prompts=[make_prompt(0)], probe=FakeProbe())
    rig.run()
    reported = learner_keys(tmp_path / "model") | {key for _, metrics in rig.journal.rows for key in metrics}
    for key in reported:
        definition(key)
    expected = set(CATALOGUE)
    for kind, parts in PARTS.items():
        expected |= {f"{n}/{kind}/{part}" for n, metric in CATALOGUE.items() if getattr(metric, kind) for part in parts}
    assert expected - reported == set()
    assert reported - expected == set()


def test_the_page_of_metrics_is_the_one_the_catalogue_gives() -> None:
    page = reference.page()
    assert (Path(__file__).parents[3] / "docs" / "metrics.md").read_text() == page, "run rlsys.observability.reference"
    assert all(f"| `{name}` |" in page for name in CATALOGUE)
    areas = [line for line in page.splitlines() if line.startswith("## ")]
    assert len(areas) == len(set(areas)), "metrics of one area stand together in the catalogue"
