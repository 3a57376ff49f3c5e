"""The public names, pinned: what `from rlsys import ...` promises."""

import json
import subprocess
import sys

import rlsys


def test_the_public_names_are_these_and_each_is_there() -> None:
    assert rlsys.__all__ == ["RlsysError", "RunConfig", "TrainResult", "load_config", "train"]
    for name in rlsys.__all__:
        assert getattr(rlsys, name) is not None


IMPORTED = """
import importlib, json, sys
found = {}
for module in sys.argv[1:]:
    importlib.import_module(module)
    found[module] = [heavy for heavy in ("ray", "torch", "vllm", "transformers") if heavy in sys.modules]
print(json.dumps(found))
"""


def test_importing_the_package_or_a_role_that_only_passes_tickets_on_starts_nothing_heavy() -> None:
    """One process imports them in turn: the first that is to blame has the first entry."""
    roles = ["rlsys.control.build", "rlsys.actors.weight_sync", "rlsys.actors.recorder"]
    command = [sys.executable, "-c", IMPORTED, "rlsys", *roles]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["rlsys"] == []
    assert [set(found[role]) - {"ray"} for role in roles] == [set()] * 3


def test_an_unknown_name_is_refused_as_usual() -> None:
    assert not hasattr(rlsys, "trian")
