"""`rlsys lab …` as typed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rlsys.cli_lab import app
from rlsys.errors import ConfigError
from rlsys.lab.claims import CLAIMS
from rlsys.lab.claims.outcome import Outcome, equal

TINY = ["--vocabulary", "2", "--length", "2", "--tasks", "2", "--samples", "4", "--staleness", "0,2"]


def lab(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_claims_are_printed_with_prediction_and_measurement() -> None:
    result = lab("claims", "--only", "12,14")
    assert result.exit_code == 0
    assert "12 pass Signal loss" in result.stdout
    assert "predicted 0.430467 ± 1e-12, measured 0.4305 exact" in result.stdout
    assert "2 claims, all pass" in result.stdout


def test_claims_as_json_are_nothing_but_json() -> None:
    data = json.loads(lab("claims", "--only", "12", "--json").stdout)
    assert data["passed"]
    assert data["claims"][0]["number"] == 12


def test_claims_write_their_record_and_a_picture_each(tmp_path: Path) -> None:
    assert lab("claims", "--only", "12,14", "--out", str(tmp_path)).exit_code == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["claim-12.png", "claim-14.png", "claims.json", "claims.md"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_claim_that_fails_makes_the_command_fail(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Outcome(checks=(equal("two and two", 5.0, 4.0, 0.1),), draw=lambda figure: None)
    monkeypatch.setitem(CLAIMS, 12, replace(CLAIMS[12], measure=lambda tasks: wrong))
    result = lab("claims", "--only", "12,14", *options)
    assert result.exit_code == 1
    assert ('"passed": false' if options else "12 FAIL") in result.stdout


def test_a_study_is_printed_as_a_table_or_as_json(tmp_path: Path) -> None:
    chosen = ["--objectives", "ppo_clip,is_sequence", "--corrections", "none,tis"]
    text = lab("study", *TINY, *chosen, "--out", str(tmp_path))
    assert text.exit_code == 0
    assert "is_sequence" in text.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        *("study.json", "study.md", "study-bias-variance.png", "study-cosine.png"),
    }
    data = json.loads(lab("study", *TINY, *chosen, "--json").stdout)
    assert data == json.loads((tmp_path / "study.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["claims", "--only", "3,18"], r"only=\[18\]: claims have the numbers 1 to 17"),
        (["claims", "--only", "three"], "whole numbers with commas"),
        (["study", "--objectives", "ppo"], "allowed are reinforce"),
        (["study", "--vocabulary", "9"], "cannot be enumerated"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
