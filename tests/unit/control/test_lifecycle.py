from pathlib import Path

import pytest

from rlsys.config.load import parse_config
from rlsys.control.lifecycle import initial_model


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
