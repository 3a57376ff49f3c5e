"""Image, cluster launcher and Slurm script: what can be known of them without Docker, a cloud or a cluster."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"

INSTRUCTIONS = {"FROM", "RUN", "USER", "WORKDIR", "ENV", "COPY", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip() and not line.startswith("#")]  # type: ignore[misc]


def stage(name: str) -> list[tuple[str, str]]:
    """A stage's own instructions."""
    found: dict[str, list[tuple[str, str]]] = {}
    for instruction, rest in instructions():
        if instruction == "FROM":
            current = found.setdefault(rest.split()[-1], [])
        current.append((instruction, rest))
    return found[name]


# The image


def test_the_dockerfile_has_a_target_for_each_lock_and_both_install_as_everybody_does() -> None:
    assert {instruction for instruction, _ in instructions()} <= INSTRUCTIONS
    targets = [rest.split()[-1] for instruction, rest in instructions() if instruction == "FROM"]
    assert targets == ["base", "cpu", "gpu"]
    for target in ("cpu", "gpu"):
        assert (ROOT / "requirements" / f"{target}.lock").is_file()
        assert ("RUN", f"RLSYS_EXTRA={target} scripts/bootstrap") in stage(target)
        assert stage(target)[0] == ("FROM", f"base AS {target}")
    installs = [rest for instruction, rest in instructions() if instruction == "RUN" and "pip" in rest]
    assert installs == []


def test_what_the_dockerfile_copies_is_there_and_is_all_that_the_bootstrap_reads() -> None:
    copied = [shlex.split(rest) for instruction, rest in stage("base") if instruction == "COPY"]
    sources = {word for words in copied for word in words[:-1] if not word.startswith("--")}
    for source in sources:
        assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {
        "pyproject.toml",
        "requirements",
        "scripts/bootstrap",
        project["readme"],
        *project["license-files"],
    } <= sources
    assert "rlsys/__init__.py" in sources, "the editable install looks for the package"


def test_nothing_that_the_image_needs_is_left_out_of_its_context() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {".git", ".venv", ".cache", "runs"} <= set(ignored)
    assert not {"rlsys", "configs", "scripts", "requirements", "deploy"} & set(ignored)


def test_the_image_runs_as_a_user_that_the_manifests_name_and_asks_for_tokens() -> None:
    base = stage("base")
    (user,) = (rest for instruction, rest in base if instruction == "USER")
    assert any(f"--uid 1000 {user}" in rest for instruction, rest in base if instruction == "RUN")
    assert any("RAY_AUTH_MODE=token" in rest for instruction, rest in base if instruction == "ENV")
    assert ("WORKDIR", "/rlsys") in base


# Ray's cluster launcher


@pytest.fixture
def launcher() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "ray" / "cluster.yaml").read_text())
    return loaded


def test_ray_accepts_the_launchers_configuration(launcher: dict[str, Any]) -> None:
    validate_config(prepare_config(launcher))


@pytest.mark.parametrize(
    ("field", "value"), [("max_worker", 3), ("head_node_type", "main"), ("max_workers", 1), ("docker", {"img": "x"})]
)
def test_ray_refuses_a_mistake_in_it(launcher: dict[str, Any], field: str, value: Any) -> None:
    launcher[field] = value
    with pytest.raises(Exception, match=r"."):
        validate_config(prepare_config(launcher))


def test_the_launcher_starts_nodes_for_each_role_and_all_ask_for_the_token(launcher: dict[str, Any]) -> None:
    types = launcher["available_node_types"]
    offered = {name: set(node["resources"]) - {"CPU", "GPU"} for name, node in types.items()}
    assert offered == {"head": set(), "rollout": {"rollout"}, "learner": {"learner"}, "reward": {"reward"}}
    assert types["learner"]["min_workers"] == types["learner"]["max_workers"]
    assert types["rollout"]["min_workers"] < types["rollout"]["max_workers"]
    starts = [
        command
        for kind in ("head", "worker")
        for command in launcher[f"{kind}_start_ray_commands"]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all(command.startswith("RAY_AUTH_MODE=token ray start") for command in starts)
    (token,) = launcher["file_mounts"]
    assert f"chmod 600 ~/{Path(token).relative_to('/home/ray')}" in launcher["setup_commands"]


# Slurm


@pytest.mark.parametrize("script", ["rlsys.sbatch", "try-on-loopback"])
def test_the_slurm_scripts_are_bash_and_stop_no_ray_but_their_own(script: str) -> None:
    path = DEPLOY / "slurm" / script
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    commands = "\n".join(line.split("#")[0] for line in path.read_text().splitlines())
    assert not re.search(r"ray stop|symmetric-run|pkill|killall", commands)


def test_a_slurm_job_has_a_token_of_its_own_on_no_command_line() -> None:
    text = (DEPLOY / "slurm" / "rlsys.sbatch").read_text()
    assert text.index("export RAY_AUTH_MODE=token") < text.index("start --block")
    assert not re.search(r"--\S*=\S*RAY_AUTH_TOKEN", text)
