"""The configuration offers exactly what the mathematics implements; neither may import the other."""

from typing import get_args

from pydantic import BaseModel

from rlsys.algo.advantages import ADVANTAGES
from rlsys.algo.batch import REDUCTIONS
from rlsys.algo.corrections import CORRECTION_OPTIONS, SEQUENCE_OBJECTIVES
from rlsys.algo.divergence import KL_ESTIMATORS, KL_SCHEDULES
from rlsys.algo.objectives import OBJECTIVE_OPTIONS, OBJECTIVES
from rlsys.config import objective as config

NEEDS_MORE_THAN_A_REWARD = {"accepted"}
"""Chosen by the objective `raft`, not by a user."""


def choices(section: type[BaseModel], field: str) -> set[str]:
    return set(get_args(section.model_fields[field].annotation))


def test_every_objective_can_be_chosen_and_takes_the_options_it_has() -> None:
    assert set(get_args(config.ObjectiveName)) == set(OBJECTIVES)
    assert {name: set(OBJECTIVE_OPTIONS[name]) for name in OBJECTIVES} == {
        name: set(fields) for name, fields in config.OBJECTIVE_FIELDS.items()
    }
    assert config.SEQUENCE_OBJECTIVES == SEQUENCE_OBJECTIVES


def test_every_correction_can_be_chosen_and_takes_the_options_it_has() -> None:
    assert {name: set(options) for name, options in CORRECTION_OPTIONS.items()} == {
        name: set(fields) for name, fields in config.CORRECTION_FIELDS.items()
    }


def test_the_bounds_of_a_correction_that_are_not_set_are_the_same() -> None:
    banded = {name: options for name, options in CORRECTION_OPTIONS.items() if "low" in options}
    assert {name: (o["low"], o["high"]) for name, o in banded.items()} == config.CORRECTION_BANDS


def test_every_reduction_estimator_schedule_and_advantage_can_be_chosen() -> None:
    assert choices(config.ObjectiveConfig, "reduce") == set(REDUCTIONS)
    assert choices(config.KLConfig, "estimator") == set(KL_ESTIMATORS)
    assert choices(config.KLConfig, "schedule") == set(KL_SCHEDULES) == set(config.KL_SCHEDULE_FIELDS)
    assert choices(config.AdvantageConfig, "name") == set(ADVANTAGES) - NEEDS_MORE_THAN_A_REWARD
