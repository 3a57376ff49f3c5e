"""What cannot work is refused by the command line with field, value and what is allowed, before Ray is started.

All mistakes but the last are made one after another in one fresh process, which says what it had imported by then.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlsys.config.schema import TinyModelConfig
from rlsys.learning.tiny import make_tiny
from tests.integration.running import python, running, write_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ALPHABET = "0123456789=+"

DRIVER = """
import contextlib, io, json, sys
from pathlib import Path

from rlsys.cli import main

found = {}
for name, arguments in json.loads(Path("cases.json").read_text()).items():
    sys.argv = ["rlsys", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    ray = sys.modules.get("ray")
    found[name] = {
        "code": code,
        "stdout": out.getvalue(),
        "stderr": " ".join(err.getvalue().split()),
        "imported": ray is not None,
        "started": ray is not None and ray.is_initialized(),
    }
Path("found.json").write_text(json.dumps(found))
"""

# Mistakes that can be seen in the configuration alone: what is written, and what the answer must contain.
WRITTEN: dict[str, tuple[list[str], list[str]]] = {
    "temperature": (["rollout.temperature=-1"], ["rollout.temperature=-1: must be greater than 0"]),
    "no workers": (["rollout.workers=0"], ["rollout.workers=0: must be at least 1"]),
    "negative bound": (["staleness.max=-1"], ["staleness.max=-1: must be at least 0"]),
    "lag above the bound": (["staleness.serving_lag=9"], ["staleness.serving_lag=9: must not exceed max=3"]),
    "window too wide": (["staleness.window=100"], ["staleness.window=100: must be at most 17"]),
    "unknown objective": (["objective.name=ppo_clp"], ["objective.name='ppo_clp'", "did you mean 'ppo_clip'?"]),
    "unknown section": (["rollot.workers=2"], ["rollot", "unknown key", "did you mean 'rollout'?"]),
    "no room for a prompt": (
        ["rollout.max_new_tokens=16"],
        ["rollout.max_new_tokens=16", "less than model.max_context=16"],
    ),
    "truncated sampling": (["rollout.top_p=0.9"], ["rollout.top_p=0.9: must be 1"]),
    "KL without a reference": (["kl.reference=false"], ["kl.reference=false: must be true with coef=0.001"]),
    "heads": (["model.tiny.heads=3"], ["model.tiny.heads=3: must divide hidden_size=64"]),
    "a name that leaves the directory": (["name=../elsewhere"], ["name='../elsewhere'", "plain directory name"]),
    "remote code": (["rollout.engine_options={trust_remote_code: true}"], ["trust_remote_code=true", "never run"]),
    "unknown task": (["task={name: chess}"], ["task.name='chess'", "'arithmetic'", "'jsonl'"]),
    "unknown reward": (["reward.function=nonsense"], ["reward.function='nonsense'", "'exact_match'"]),
    "not a number": (["learner.lr=.nan"], ["learner.lr=nan: must be a finite number"]),
    "one sample": (["rollout.samples_per_prompt=1"], ["rollout.samples_per_prompt=1: must be at least 2"]),
    "no value": (["learner.steps"], ["override 'learner.steps'", "expected section.field=value"]),
    "two mistakes": (["learner.steps=0", "seed=x"], ["2 problems", "learner.steps=0", "seed='x'"]),
}

# Mistakes that show when the named files are looked at.
LOOKED_AT: dict[str, tuple[list[str], list[str]]] = {
    "no model": (["model.path=./nowhere"], ["model.path=./nowhere: no such directory"]),
    "no weights": (["model.path=./weightless"], ["model.path=./weightless: no *.safetensors file"]),
    "no tokenizer": (["model.path=./speechless"], ["model.path=./speechless: tokenizer_config.json is missing"]),
    "no configuration": (["model.path=./shapeless"], ["model.path=./shapeless: config.json is missing"]),
    "context beyond the positions": (
        ["model.path=./model", "model.max_context=999"],
        ["model.max_context=999", "allowed: 1..512"],
    ),
    "reward that is not there": (
        ["reward.function=absent:f"],
        ["reward.function='absent:f'", "No module named 'absent'"],
    ),
    "reward that is no function": (
        ["reward.function=mine:NUMBER"],
        ["reward.function='mine:NUMBER'", "expected a function"],
    ),
    "reward whose module fails": (["reward.function=broken:f"], ["reward.function='broken:f'", "ZeroDivisionError"]),
    "task class that is not there": (
        ["task={name: custom, target: 'mine:Absent'}"],
        ["task.target='mine:Absent'", "no attribute 'Absent'"],
    ),
    "task class that is no task": (
        ["task={name: custom, target: 'mine:Number'}"],
        ["task.target='mine:Number'", "expected a subclass of rlsys.tasks.Task"],
    ),
    "all questions held out": (["task.eval_size=100"], ["task.eval_size=100", "allowed: < 100"]),
    "no dataset": (["task={name: jsonl, path: absent.jsonl}"], ["task.path=absent.jsonl: no such file"]),
    "empty dataset": (["task={name: jsonl, path: empty.jsonl}"], ["empty.jsonl has no rows"]),
    "a line that is not JSON": (["task={name: jsonl, path: broken.jsonl}"], ["broken.jsonl, line 3: not JSON"]),
    "a line without an answer": (
        ["task={name: jsonl, path: unanswered.jsonl}"],
        ["unanswered.jsonl, line 2: no value in column 'answer'", "it has prompt"],
    ),
    "more held out than there is": (
        ["task={name: jsonl, path: good.jsonl, eval_size: 9}"],
        ["task.eval_size=9", "has 3 rows"],
    ),
    "a prompt beyond the context": (
        ["model.path=./model", "task={name: jsonl, path: long.jsonl, eval_size: 1}"],
        ["has 24 tokens; allowed: 1..12", "model.max_context=16", "rollout.max_new_tokens=4"],
    ),
    "nothing to resume": (["--resume"], ["--resume", "holds no run", "name and run_dir"]),
}

ELSEWHERE: dict[str, tuple[list[str], list[str]]] = {
    "no such file": (["train", "rnu.yaml"], ["rnu.yaml: no such file", "did you mean run.yaml?"]),
    "not YAML": (["train", "broken.yaml"], ["broken.yaml, line 2", "not valid YAML"]),
    "no checkpoint": (["eval", "./nowhere", "run.yaml"], ["nowhere: no such directory"]),
    "a checkpoint without a run": (["eval", "./model"], ["config.yaml: no such file"]),
}

CASES = {
    **{name: (["train", "run.yaml", *written], said) for name, (written, said) in {**WRITTEN, **LOOKED_AT}.items()},
    **ELSEWHERE,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with everything that the mistakes name."""
    path = tmp_path_factory.mktemp("refused")
    write_config(path)
    tiny = TinyModelConfig(hidden_size=64, layers=1, heads=2, kv_heads=1, intermediate_size=64)
    make_tiny(tiny, ALPHABET, path / "model")
    for name, missing in (
        ("weightless", "model.safetensors"),
        ("speechless", "tokenizer_config.json"),
        ("shapeless", "config.json"),
    ):
        shutil.copytree(path / "model", path / name)
        (path / name / missing).unlink()
    good = [json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) for i in range(3)]
    for name, lines in {
        "good.jsonl": good,
        "empty.jsonl": [],
        "broken.jsonl": [*good[:2], '{"prompt": "2+1=", "answer"'],
        "unanswered.jsonl": [good[0], '{"prompt": "1+1="}'],
        "long.jsonl": [*good, json.dumps({"prompt": "1+" * 11 + "1=", "answer": "12"})],
        "mine.py": ["NUMBER = 7", "class Number: pass"],
        "broken.py": ["1 / 0"],
        "broken.yaml": ["name: [", "task: }"],
    }.items():
        (path / name).write_text("".join(line + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, dict[str, Any]]:
    """What came of each mistake."""
    (home / "cases.json").write_text(json.dumps({name: arguments for name, (arguments, _) in CASES.items()}))
    outcome = python(home, "-c", DRIVER)
    assert outcome.code == 0, outcome.stderr
    answers: dict[str, dict[str, Any]] = json.loads((home / "found.json").read_text())
    return answers


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_refused_with_field_value_and_what_is_allowed(name: str, found: dict[str, dict[str, Any]]) -> None:
    answer = found[name]
    assert answer["code"] == 1
    for part in CASES[name][1]:
        assert part in answer["stderr"]
    assert "Traceback" not in answer["stderr"]
    assert answer["stdout"].strip() == ""
    assert not answer["started"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_mistake_in_the_configuration_is_refused_before_ray_is_imported(
    name: str, found: dict[str, dict[str, Any]]
) -> None:
    assert not found[name]["imported"]


def test_a_refused_run_leaves_no_directory(home: Path, found: dict[str, dict[str, Any]]) -> None:
    assert not (home / "runs").exists()


def test_a_cluster_that_cannot_be_reached_is_refused_by_name(home: Path) -> None:
    arguments = ("train", "run.yaml", "resources.address=127.0.0.1:9", "model.path=./model")
    with running(home, *arguments) as command:
        outcome = command.finish(within_s=180)  # Ray alone tries for a quarter of an hour
    assert outcome.code == 1
    assert "resources.address=127.0.0.1:9: cannot join the Ray cluster" in " ".join(outcome.stderr.split())
    assert "Traceback" not in outcome.stderr
    assert outcome.left == []
