"""The public names, pinned: what `from rlsys import ...` promises."""

import subprocess
import sys

import pytest

import rlsys


def test_the_public_names_are_these_and_each_is_there() -> None:
    assert rlsys.__all__ == ["RlsysError", "RunConfig", "TrainResult", "load_config", "train"]
    for name in rlsys.__all__:
        assert getattr(rlsys, name) is not None


def imported(module: str, *heavy: str) -> str:
    """Which of these a module's import brings along."""
    check = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_starts_nothing_heavy() -> None:
    assert imported("rlsys", "ray", "torch", "vllm", "transformers") == "[]\n"


@pytest.mark.parametrize("module", ["rlsys.control.build", "rlsys.actors.weight_sync", "rlsys.actors.recorder"])
def test_roles_that_only_pass_tickets_on_do_not_wait_for_torch(module: str) -> None:
    assert imported(module, "torch", "vllm", "transformers") == "[]\n"


def test_an_unknown_name_is_refused_as_usual() -> None:
    assert not hasattr(rlsys, "trian")
