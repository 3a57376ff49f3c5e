"""What travels with a submitted run, what is refused, and that paths keep their meaning."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlsys.config import RunConfig, load_config, parse_config
from rlsys.control.shipping import CONFIG, LIMIT_MIB, own_code, prepare
from rlsys.errors import ConfigError

ROWS = "".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(4))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory; what its tests import is forgotten, and the import path is as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("rlsys.control.shipping.sys", _Fresh(set(sys.modules)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(ROWS)
    return tmp_path


class _Fresh:
    """`sys`, whose modules are those that a test has added: pytest's own would travel, too."""

    def __init__(self, known: set[str]) -> None:
        self._known = known

    @property
    def modules(self) -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name not in self._known}


def config(**sections: object) -> RunConfig:
    return parse_config({"task": {"name": "arithmetic"}, **sections})


def test_the_run_joins_the_cluster_that_it_was_submitted_to(here: Path) -> None:
    shipment = prepare(config(run_dir="/shared/runs"), here=here, shared=False)
    assert shipment.config.resources.address == "auto"
    assert shipment.config.run_dir == Path("/shared/runs")


def test_elsewhere_run_files_need_an_absolute_place(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"run_dir=runs: must be absolute .* run_dir=/shared/runs"):
        prepare(config(), here=here, shared=False)


def test_elsewhere_the_made_model_lands_beside_the_runs_where_every_node_sees_it(here: Path) -> None:
    shipment = prepare(config(run_dir="/shared/runs"), here=here, shared=False)
    assert shipment.config.model.warmstart.cache_dir == Path("/shared/runs/.warmstart")


def test_on_this_machine_relative_paths_mean_what_they_mean_here(here: Path) -> None:
    shipment = prepare(config(), here=here, shared=True)
    assert shipment.config.run_dir == here / "runs"
    assert shipment.config.model.warmstart.cache_dir == here / ".cache" / "warmstart"


def test_a_model_directory_does_not_travel(here: Path) -> None:
    (here / "model").mkdir()
    with pytest.raises(ConfigError, match=r"model.path=model: a model does not travel"):
        prepare(config(run_dir="/r", model={"path": "model"}), here=here, shared=False)


def test_a_model_directory_of_the_cluster_is_not_looked_for_here(here: Path) -> None:
    shipment = prepare(config(run_dir="/r", model={"path": "/shared/model"}), here=here, shared=False)
    assert shipment.config.model.path == "/shared/model"


def test_data_below_the_working_directory_travels_to_the_same_relative_place(here: Path) -> None:
    task = {"name": "jsonl", "path": "data/train.jsonl", "eval_size": 1}
    shipment = prepare(config(run_dir="/r", task=task), here=here, shared=False)
    assert shipment.files[Path("data/train.jsonl")] == here / "data" / "train.jsonl"
    assert shipment.config.task.path == Path("data/train.jsonl")  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["link.jsonl", "./data/../data/./train.jsonl", "linked/train.jsonl"])
def test_data_is_found_there_whichever_way_it_was_called(here: Path, path: str) -> None:
    (here / "data" / "blob").write_text(ROWS)
    (here / "link.jsonl").symlink_to("data/blob")
    (here / "linked").symlink_to("data")
    task = {"name": "jsonl", "path": path, "eval_size": 1}
    shipment = prepare(config(run_dir="/r", task=task), here=here, shared=False)
    target = here / "packed"
    target.mkdir()
    shipment.pack(target)
    there = load_config(target / CONFIG).task.path  # type: ignore[union-attr]
    assert there.suffix == ".jsonl", "it is read by its name"
    assert (target / there).read_text() == ROWS
    assert not (target / there).is_symlink()


def test_what_is_included_lies_there_under_the_name_that_it_was_called_by(here: Path) -> None:
    (here / "linked").symlink_to("data")
    included = [Path("linked"), Path("data/../data/train.jsonl")]
    shipment = prepare(config(run_dir="/r"), here=here, shared=False, include=included)
    assert set(map(str, shipment.files)) == {"rlsys", "linked", "data/train.jsonl"}


def test_data_outside_the_working_directory_is_refused(here: Path) -> None:
    (here / "below").mkdir()
    task = {"name": "jsonl", "path": "../data/train.jsonl", "eval_size": 1}
    with pytest.raises(ConfigError, match=r"task.path=../data/train.jsonl: only files below the working directory"):
        prepare(config(run_dir="/r", task=task), here=here / "below", shared=False)


def test_data_of_the_cluster_is_left_to_the_cluster_to_check(here: Path) -> None:
    task = {"name": "jsonl", "path": "/shared/train.jsonl", "eval_size": 1}
    shipment = prepare(config(run_dir="/r", task=task), here=here, shared=False)
    assert shipment.remarks == ["/shared/train.jsonl is not here: its rows are checked when the run starts"]
    assert set(shipment.files) == {Path("rlsys")}


def test_a_users_modules_travel_with_what_they_import(here: Path) -> None:
    (here / "beside.py").write_text("WORTH = 1.0\n")
    (here / "inside").mkdir()
    (here / "inside" / "__init__.py").write_text("")
    (here / "inside" / "deep.py").write_text("from beside import WORTH\n")
    (here / "inside" / "table.txt").write_text("read at run time")
    (here / "unrelated.py").write_text("")
    (here / "graded.py").write_text("from inside.deep import WORTH\ndef score(prompt, response): return WORTH\n")
    shipment = prepare(config(run_dir="/r", reward={"function": "graded:score"}), here=here, shared=False)
    assert set(map(str, shipment.files)) == {"rlsys", "graded.py", "inside", "beside.py"}

    target = here / "packed"
    target.mkdir()
    shipment.pack(target)
    names = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert {"graded.py", "beside.py", "inside/deep.py", "inside/table.txt", "rlsys/cli.py", CONFIG} <= names
    assert not any("__pycache__" in name for name in names)
    assert load_config(target / CONFIG) == shipment.config


def test_a_module_is_placed_where_import_will_find_it_wherever_it_was_found() -> None:
    def module(file: str) -> ModuleType:
        made = ModuleType("made")
        made.__file__ = file
        return made

    found = own_code(
        {
            "plain": module("/somewhere/lib/plain.py"),
            "package": module("/home/me/src/package/__init__.py"),
            "package.part": module("/home/me/src/package/part.py"),
            "space.part": module("/home/me/space/part.py"),
            "rlsys.cli": module("/home/me/rlsys/cli.py"),
            "__main__": module("/home/me/script.py"),
            "json": json,
            "pytest": pytest,
        }
    )
    assert found == {
        Path("plain.py"): Path("/somewhere/lib/plain.py"),
        Path("package"): Path("/home/me/src/package"),
        Path("space"): Path("/home/me/space"),
    }


def test_what_else_a_run_reads_can_be_included(here: Path) -> None:
    shipment = prepare(config(run_dir="/r"), here=here, shared=False, include=[Path("data")])
    assert shipment.files[Path("data")] == here / "data"
    with pytest.raises(ConfigError, match=r"--include=absent: no such file"):
        prepare(config(run_dir="/r"), here=here, shared=False, include=[Path("absent")])


def test_too_much_is_refused_by_name(here: Path) -> None:
    with (here / "data" / "huge").open("wb") as file:
        file.truncate((LIMIT_MIB + 1) << 20)
    shipment = prepare(config(run_dir="/r"), here=here, shared=False, include=[Path("data")])
    target = here / "packed"
    target.mkdir()
    with pytest.raises(ConfigError, match=rf"at most {LIMIT_MIB} can; largest: data/huge \({LIMIT_MIB + 1} MiB\)"):
        shipment.pack(target)
    assert list(target.iterdir()) == [], "it was copied before it was measured"


def test_what_cannot_be_packed_is_named(here: Path) -> None:
    (here / "data" / "nowhere").symlink_to("absent")
    shipment = prepare(config(run_dir="/r"), here=here, shared=False, include=[Path("data")])
    target = here / "packed"
    target.mkdir()
    with pytest.raises(ConfigError, match=rf"^cannot pack {here}/data: .*No such file or directory: '.*/nowhere'"):
        shipment.pack(target)
    (here / "data" / "nowhere").unlink()
    (here / "data" / ".hidden").symlink_to("absent")
    os.mkfifo(here / "data" / "pipe")
    with pytest.raises(ConfigError, match=rf"^cannot pack {here}/data/pipe: .*is a named pipe"):
        shipment.pack(target)


def test_what_travels_twice_counts_once(here: Path) -> None:
    with (here / "data" / "huge").open("wb") as file:
        file.truncate((LIMIT_MIB // 2 + 1) << 20)
    included = [Path("data"), Path("data/huge")]
    shipment = prepare(config(run_dir="/r"), here=here, shared=False, include=included)
    target = here / "packed"
    target.mkdir()
    shipment.pack(target)
    assert sorted(path.name for path in (target / "data").iterdir()) == ["huge", "train.jsonl"]
