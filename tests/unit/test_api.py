"""The public names, pinned: what `from rlsys import ...` promises."""

import subprocess
import sys

import rlsys


def test_the_public_names_are_these_and_each_is_there() -> None:
    assert rlsys.__all__ == ["RlsysError", "RunConfig", "TrainResult", "load_config", "train"]
    for name in rlsys.__all__:
        assert getattr(rlsys, name) is not None


def test_importing_the_package_starts_nothing_heavy() -> None:
    check = "import rlsys, sys; print([m for m in ('ray', 'torch', 'vllm', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_unknown_name_is_refused_as_usual() -> None:
    assert not hasattr(rlsys, "trian")
