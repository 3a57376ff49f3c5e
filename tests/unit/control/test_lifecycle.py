from pathlib import Path

import pytest

from rlsys.config.load import parse_config
from rlsys.control.lifecycle import initial_model, train
from rlsys.errors import CheckpointError
from rlsys.observability.run_directory import RunDirectory
from tests.fakes import make_config


def test_a_relative_model_directory_means_the_same_to_processes_that_work_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = parse_config({"task": {"name": "arithmetic"}, "model": {"path": "models/mine"}})

    assert initial_model(config) == str(tmp_path / "models" / "mine")


def test_a_hub_name_stays_a_name() -> None:
    config = parse_config({"task": {"name": "arithmetic"}, "model": {"path": "Qwen/Qwen2.5-0.5B-Instruct"}})

    assert initial_model(config) == "Qwen/Qwen2.5-0.5B-Instruct"


def test_resume_of_a_run_without_a_checkpoint_says_how_to_start_it_again(tmp_path: Path) -> None:
    config = make_config(tmp_path, "name=early")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint; so start without --resume"):
        train(config, resume=True)

    directory = RunDirectory(config.path)
    directory.create("")
    directory.metrics.write_text('{"step": 0, "eval/accuracy": 0.5}\n')
    with pytest.raises(CheckpointError, match=r"remove it, or choose another name .* start without --resume"):
        train(config, resume=True)
