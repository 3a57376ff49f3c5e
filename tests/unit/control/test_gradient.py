"""The audit of a finished run: what it needs of the directory, and that it audits the batch that was trained."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rlsys.cli_lab import app
from rlsys.config.load import dump_config
from rlsys.config.schema import RunConfig
from rlsys.control.gradient import audit_run
from rlsys.control.preflight import load_prompts
from rlsys.errors import CheckpointError, ConfigError
from rlsys.learning.audit import GradientAudit
from rlsys.learning.checkpoint import save
from rlsys.learning.learner import Learner
from rlsys.learning.tiny import make_tiny
from rlsys.observability.rollouts import read_rollouts, write_rollouts
from rlsys.observability.run_directory import RunDirectory
from rlsys.records import GroupScore, RolloutGroup, ScoredGroup
from rlsys.rewards import score_group
from rlsys.tasks import build_task
from tests.fakes import make_config, same_parity

GROUPS, SAMPLES = 4, 6


def sampled(config: RunConfig, path: Path, version: int) -> list[ScoredGroup]:
    """A batch that the policy in `path` sampled, scored by the run's reward."""
    source = load_prompts(config, str(path)).source
    prompts = [source.prompt(0, GROUPS * version + i) for i in range(GROUPS)]
    groups = GradientAudit(config, path).sample(prompts, SAMPLES, seed=version, version=version)
    return [ScoredGroup(group=group, score=reward(group)) for group in groups]


def reward(group: RolloutGroup) -> GroupScore:
    return score_group(same_parity, group, timeout_s=10.0, retries=0)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of two steps by hand on an untrained model, each from a batch of the initial policy's."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("finished")
    config = make_config(
        home,
        "task.digits=1",
        "task.eval_size=20",
        f"rollout.prompts_per_step={GROUPS}",
        f"rollout.samples_per_prompt={SAMPLES}",
        "rollout.max_new_tokens=3",
        "model.tiny.hidden_size=32",
        "model.tiny.layers=2",
        "reward.function=tests.fakes:same_parity",
    )
    model = home / "model"
    make_tiny(config.model.tiny, build_task(config.task, config.seed).alphabet(), model, seed=1)
    directory = RunDirectory(config.path)
    directory.create(dump_config(config))
    learner = Learner.of(config, model)
    for version in (1, 2):
        batch = sampled(config, model, 0)
        arrays = learner.update(batch).arrays
        write_rollouts(
            directory.rollouts / f"step-{version:06d}.parquet",
            version,
            [one.group for one in batch],
            [one.score for one in batch],
            arrays,
        )
        save(directory.checkpoints / f"step-{version:06d}", learner, tokenizer_from=model)
    return config


@pytest.fixture
def copy(config: RunConfig, tmp_path: Path) -> RunDirectory:
    """The same run, to be damaged."""
    shutil.copytree(config.path, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def test_the_audited_batch_is_the_recorded_one_at_the_checkpoint_it_was_trained_from(config: RunConfig) -> None:
    report = audit_run(config.path)
    (step,) = report.steps
    assert (step.version, step.staleness, step.groups) == (1, 1.0, GROUPS)
    checkpoint = RunDirectory(config.path).checkpoints / "step-000001"
    batch = sampled(config, config.run_dir / "model", 0)
    again = GradientAudit(config, checkpoint).measure(batch, reward, version=1, seed=config.seed)
    assert step.result.gg == pytest.approx(again.gg, rel=1e-5)
    assert step.result.metrics() == pytest.approx(again.metrics(), rel=1e-4)
    assert again.ab != 0, "nothing to learn from"
    assert report.plot.read_bytes().startswith(b"\x89PNG")


def test_prompts_and_samples_can_be_chosen(config: RunConfig) -> None:
    seen: list[tuple[int, int]] = []
    report = audit_run(config.path, version=1, prompts=2, samples=4, on_step=lambda *step: seen.append(step))
    assert (report.samples, report.steps[0].groups) == (4, 2)
    assert report.steps[0].result != audit_run(config.path).steps[0].result
    assert seen == [(0, 1)]


def test_the_command_prints_a_row_for_every_audited_step_or_json(config: RunConfig) -> None:
    printed = CliRunner().invoke(app, ["gradient", str(config.path)])
    assert printed.exit_code == 0, printed.output
    (row,) = [line.split() for line in printed.stdout.splitlines() if line.split()[:1] == ["1"]]
    assert row[:3] == ["1", "1.00", str(GROUPS)]
    assert str(config.path / "gradient.png") in printed.stdout
    data = json.loads(CliRunner().invoke(app, ["gradient", str(config.path), "--json"]).stdout)
    assert data["steps"][0]["version"] == 1
    assert row[3] == f"{data['steps'][0]['cosine']:.3f}"
    assert row[4] == f"{data['steps'][0]['cosine_floor']:.3f}"


def test_a_run_without_a_checkpoint_and_its_next_batch_says_what_to_set(copy: RunDirectory) -> None:
    shutil.rmtree(copy.checkpoints / "step-000001")
    with pytest.raises(CheckpointError, match=r"checkpoints 2, batches 1, 2\.") as error:
        audit_run(copy.root)
    for field in ("checkpoint.every", "checkpoint.keep", "records.rollouts_every=1"):
        assert field in str(error.value)
    shutil.rmtree(copy.rollouts)
    with pytest.raises(CheckpointError, match="checkpoints 2, batches none"):
        audit_run(copy.root)


def test_a_step_that_cannot_be_audited_names_those_that_can(config: RunConfig) -> None:
    with pytest.raises(CheckpointError, match=r"--step 2: .* can be audited at 1$"):
        audit_run(config.path, version=2)


def test_a_task_that_asks_something_else_now_is_refused(copy: RunDirectory) -> None:
    copy.config.write_text(copy.config.read_text().replace("seed: 0\n", "seed: 9\n", 1))
    first = read_rollouts(copy.rollouts / "step-000002.parquet")[0].group.prompt
    with pytest.raises(
        CheckpointError, match=rf"was '{re.escape(first.text)}', and the task now makes '.*cannot be scored"
    ):
        audit_run(copy.root)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        audit_run(tmp_path)
