from pathlib import Path

import pytest

from rlsys.config.load import parse_config
from rlsys.config.tasks import JsonlTask
from rlsys.control.lifecycle import from_anywhere, initial_model, train
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


def test_resume_needs_a_run_and_checkpoints_that_are_whole(tmp_path: Path) -> None:
    config = make_config(tmp_path, "name=early")
    with pytest.raises(CheckpointError, match="holds no run; look at name and run_dir, or start it without --resume"):
        train(config, resume=True)

    (RunDirectory(config.path).checkpoints / "step-000003").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint; remove what is there"):
        train(config, resume=True)


def test_a_directory_in_which_a_process_trains_is_not_trained_in_by_another(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "runs" / "run")
    with directory.held(), pytest.raises(CheckpointError, match="another process is training there"), directory.held():
        pass
    assert not [*tmp_path.iterdir()]  # nothing was begun
    with directory.held():
        directory.create("")
    with directory.held():
        assert directory.config.exists()


def test_paths_mean_the_same_to_processes_that_work_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    columns = {"prompt_column": "problem", "answer_column": "answer"}
    task = {"name": "jsonl", "path": "data/train.jsonl", "eval_path": "data/eval.jsonl", **columns}
    config = from_anywhere(parse_config({"task": task}))

    assert config.run_dir == tmp_path / "runs"
    assert isinstance(config.task, JsonlTask)
    assert (config.task.path, config.task.eval_path) == (tmp_path / "data/train.jsonl", tmp_path / "data/eval.jsonl")
