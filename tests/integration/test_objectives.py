"""Every objective, correction and advantage trains on a batch that the real parts sampled."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from rlsys.config import load_config
from rlsys.config.objective import SEQUENCE_OBJECTIVES, AdvantageConfig, CorrectionName, ObjectiveName
from rlsys.control.lifecycle import initial_model
from rlsys.learning.learner import Learner
from rlsys.observability.rollouts import read_rollouts
from rlsys.records import ScoredGroup
from tests.integration.running import rlsys, write_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

UPDATES = 3

PER_TOKEN = {"mask_token", "m2"}
PAIRS = [
    (objective, correction)
    for objective in get_args(ObjectiveName)
    for correction in get_args(CorrectionName)
    if not (objective in SEQUENCE_OBJECTIVES and correction in PER_TOKEN)
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of one step, whose responses are recorded."""
    path = tmp_path_factory.mktemp("objectives")
    write_config(path, learner={"steps": 1}, eval={"max_prompts": 1})
    outcome = rlsys(path, "train", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    return path


@pytest.fixture(scope="module")
def batch(home: Path) -> list[ScoredGroup]:
    (recorded,) = (home / "runs" / "run" / "rollouts").glob("*.parquet")
    groups = read_rollouts(recorded)
    assert len({float(reward) for group in groups for reward in group.score.rewards}) > 1, "nothing to learn from"
    return groups


def train(home: Path, batch: list[ScoredGroup], *overrides: str) -> None:
    """`UPDATES` steps on the batch, which grows staler with each; all are applied and change the policy."""
    config = load_config(home / "run.yaml", ["learner.updates_per_batch=2", "kl.coef=0", *overrides])
    learner = Learner.of(config, initial_model(config))
    before = {name: tensor.clone() for name, tensor in learner.named_tensors()}
    for version in range(1, UPDATES + 1):
        step = learner.update(batch).step
        assert (step.applied, step.version) == (True, version)
        assert step.metrics["staleness/mean"] == version - 1
    after = dict(learner.named_tensors())
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize(("objective", "correction"), PAIRS)
def test_every_objective_trains_with_every_correction_it_admits(
    home: Path, batch: list[ScoredGroup], objective: str, correction: str
) -> None:
    train(home, batch, f"objective.name={objective}", f"objective.correction.name={correction}")


@pytest.mark.parametrize("advantage", get_args(AdvantageConfig.model_fields["name"].annotation))
def test_every_advantage_trains(home: Path, batch: list[ScoredGroup], advantage: str) -> None:
    train(home, batch, f"advantage.name={advantage}")


@pytest.mark.parametrize("reduce", ["token_mean", "sequence_mean", "constant"])
def test_every_reduction_trains(home: Path, batch: list[ScoredGroup], reduce: str) -> None:
    train(home, batch, f"objective.reduce={reduce}")
