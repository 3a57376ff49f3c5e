"""The study: what must hold in its table whatever the numbers are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlsys.algo.corrections import CORRECTIONS
from rlsys.algo.objectives import OBJECTIVES
from rlsys.errors import ConfigError, DataError
from rlsys.lab.pictures import draw_study
from rlsys.lab.report import study_from_json, study_to_json, study_to_markdown, to_text
from rlsys.lab.study import DISTANCES, MEASURES, StudyResult, StudySettings, run_study

SMALL = StudySettings(vocabulary=3, length=3, staleness=(0, 8), samples=(8, 32), tasks=3, batches=20)


@pytest.fixture(scope="module")
def small() -> StudyResult:
    return run_study(SMALL)


def test_every_allowed_pair_is_there_at_every_age_and_size(small: StudyResult) -> None:
    pairs = {(row.objective, row.correction) for row in small.rows}
    masked = {(o, c) for o in ("is_sequence", "is_sequence_truncated", "gspo") for c in ("mask_token", "m2")}
    assert pairs == {(o, c) for o in OBJECTIVES for c in CORRECTIONS} - masked
    assert len(small.rows) == len(pairs) * 2 * 2
    assert all(set(row.measures) == set(MEASURES) for row in small.rows)


def test_a_study_repeats_with_its_seed_and_differs_with_another(small: StudyResult) -> None:
    assert study_to_json(run_study(SMALL)) == study_to_json(small)
    assert study_to_json(run_study(replace(SMALL, seed=1)))["rows"] != study_to_json(small)["rows"]


def test_on_policy_nothing_is_biased_and_all_agree(small: StudyResult) -> None:
    fresh = [row for row in small.rows if row.staleness == 0 and row.enumerated]
    assert max(row.measures["bias"].value for row in fresh) < 1e-10
    variances = {
        round(row.measures["variance"].value, 9) for row in fresh if row.samples == 8 and row.objective != "raft"
    }
    assert len(variances) == 1


def test_the_sequence_weight_is_unbiased_at_every_age_and_the_token_weight_only_on_policy(small: StudyResult) -> None:
    assert small.row("is_sequence", "none", 8, 8).measures["bias"].value < 1e-10
    assert small.row("is_token", "none", 8, 8).measures["bias"].value > 0.01


def test_the_mean_square_error_is_bias_and_variance(small: StudyResult) -> None:
    """Mean over tasks of bias² + variance, so at least the square of the mean bias."""
    for row in small.rows:
        if row.enumerated:
            found = {name: row.measures[name].value for name in MEASURES}
            assert found["mse"] >= found["bias"] ** 2 + found["variance"] - 1e-9


def test_more_responses_mean_less_variance_and_a_better_direction(small: StudyResult) -> None:
    few, many = (small.row("is_token", "tis", 8, n).measures for n in (8, 32))
    assert few["variance"].value == pytest.approx(4 * many["variance"].value)
    assert few["batch_cosine"].value < many["batch_cosine"].value < many["cosine"].value


def test_m2_is_sampled_and_agrees_with_no_correction_where_it_masks_nothing(small: StudyResult) -> None:
    masked, plain = (small.row("is_token", name, 0, 32) for name in ("m2", "none"))
    assert not masked.enumerated
    assert masked.measures["batch_cosine"].value == pytest.approx(plain.measures["batch_cosine"].value)
    assert masked.measures["mse"].value == pytest.approx(plain.measures["mse"].value, rel=0.25)
    assert masked.measures["bias"].value < 0.3


def test_policies_drift_apart_with_age(small: StudyResult) -> None:
    assert set(small.distance[8]) == set(DISTANCES)
    assert all(small.distance[0][name].value == 0 < small.distance[8][name].value for name in DISTANCES)


def test_inner_steps_let_the_clip_of_decoupled_ppo_act() -> None:
    settings = replace(
        SMALL, inner_steps=8, staleness=(0,), objectives=("decoupled_ppo", "is_token"), corrections=("none",)
    )
    result = run_study(settings)
    decoupled, token = (result.row(name, "none", 0, 8).measures["bias"].value for name in settings.objectives)
    assert decoupled > token > 0


@pytest.mark.parametrize("change", [{"ends": True}, {"drift": "aimless"}])
def test_other_kinds_of_study_hold_the_same_truths(change: dict) -> None:
    result = run_study(replace(SMALL, objectives=("is_sequence", "is_token"), corrections=("none",), **change))
    assert result.row("is_sequence", "none", 8, 8).measures["bias"].value < 1e-10
    assert result.row("is_token", "none", 8, 8).measures["bias"].value > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": ("ppo",)}, "objectives='ppo': allowed are reinforce, "),
        ({"corrections": ("tiss",)}, "corrections='tiss': allowed are none, tis"),
        ({"drift": "up"}, "drift='up'"),
        ({"samples": (0,)}, "samples"),
        ({"staleness": ()}, "staleness"),
        ({"tasks": 1}, "tasks"),
    ],
)
def test_impossible_settings_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **change)


def test_a_study_survives_json_and_keeps_its_schema(small: StudyResult) -> None:
    data = study_to_json(small)
    assert list(data) == ["schema", "settings", "distance", "rows"]
    assert list(data["rows"][0]) == ["objective", "correction", "staleness", "samples", "enumerated", *MEASURES]
    assert list(data["distance"][0]) == ["staleness", *DISTANCES]
    assert json.loads(to_text(data)) == data
    again = study_from_json(data)
    assert again.settings == SMALL
    assert study_to_json(again) == data
    assert study_to_markdown(again) == study_to_markdown(small)


def test_another_schema_is_refused(small: StudyResult) -> None:
    with pytest.raises(DataError, match="schema 2"):
        study_from_json({**study_to_json(small), "schema": 2})


def test_a_study_is_drawn(small: StudyResult, tmp_path: Path) -> None:
    paths = draw_study(small, tmp_path)
    assert [path.name for path in paths] == ["study-bias-variance.png", "study-cosine.png"]
    assert all(path.stat().st_size > 20_000 for path in paths)
