import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from rlsys.config import JsonlTask, RunConfig, dump_config, load_config, parse_config
from rlsys.config.load import _parse_yaml
from rlsys.errors import ConfigError

ROOT = Path(__file__).parents[3]
SMALLEST = {"task": {"name": "arithmetic"}}
SHIPPED = sorted(ROOT.glob("configs/**/*.yaml"))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


# Overrides


def test_an_override_is_read_as_yaml_and_replaces_what_the_file_says(tmp_path: Path) -> None:
    path = written(tmp_path, "task: {name: arithmetic, digits: 2}\nrollout: {workers: 1, temperature: 0.7}\n")
    config = load_config(path, ["rollout.workers=2", "task.operators=['+', '-']", "resources.pin_cores=false"])
    assert (config.rollout.workers, config.rollout.temperature) == (2, 0.7)
    assert config.task.name == "arithmetic"
    assert config.task.operators == ("+", "-")
    assert config.resources.pin_cores is False


def test_the_last_of_two_overrides_holds() -> None:
    assert parse_config(SMALLEST, ["seed=1", "seed=2"]).seed == 2


def test_an_override_makes_the_sections_it_needs() -> None:
    assert parse_config(SMALLEST, ["model.tiny.layers=2"]).model.tiny.layers == 2
    assert parse_config({**SMALLEST, "rollout": None}, ["rollout.workers=3"]).rollout.workers == 3


def test_an_override_leaves_its_input_alone() -> None:
    data = {"task": {"name": "arithmetic"}, "rollout": {"workers": 1}}
    parse_config(data, ["rollout.workers=2", "learner.steps=3"])
    assert data == {"task": {"name": "arithmetic"}, "rollout": {"workers": 1}}


def test_a_value_may_hold_an_equals_sign() -> None:
    assert parse_config(SMALLEST, ["model.path=/models/a=b"]).model.path == "/models/a=b"


def test_exponents_are_numbers_with_and_without_a_point() -> None:
    options = "rollout.engine_options={a: 1e-3, b: 1.5e+3, c: -2E4, d: 1e, e: 0x1e3}"
    config = parse_config(SMALLEST, ["learner.lr=3e-4", options])
    assert config.learner.lr == 3e-4
    assert config.rollout.engine_options == {"a": 1e-3, "b": 1.5e3, "c": -2e4, "d": "1e", "e": 0x1E3}


def test_a_correction_may_be_given_by_its_name_alone() -> None:
    assert parse_config(SMALLEST, ["objective.correction=tis"]).objective.correction.name == "tis"


def test_null_unsets_an_option() -> None:
    data = {**SMALLEST, "objective": {"name": "ppo_clip", "clip_low": 0.2}}
    config = parse_config(data, ["objective.name=cispo", "objective.clip_low=null", "objective.cap=5.0"])
    assert config.objective.options() == {"cap": 5.0}


def test_a_whole_section_can_be_replaced() -> None:
    config = parse_config({"task": {"name": "arithmetic", "digits": 3}}, ["task={name: jsonl, path: x.jsonl}"])
    assert config.task == JsonlTask(name="jsonl", path=Path("x.jsonl"))


@pytest.mark.parametrize("override", ["rollout.workers", "=2", ".workers=2", "rollout..workers=2", ""])
def test_an_override_without_field_and_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section\.field=value, for example rollout\.workers=2"):
        parse_config(SMALLEST, [override])


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config({**SMALLEST, "seed": 3}, ["seed.more=1"])
    assert str(error.value) == "override 'seed.more=1': seed is 3, a value and not a section, so it has no field 'more'"


def test_an_override_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"override 'task=\{name', line 1, column \d+: not valid YAML"):
        parse_config(SMALLEST, ["task={name"])


# Files


def test_a_key_given_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    path = written(tmp_path, "task: {name: arithmetic}\nrollout:\n  workers: 1\n  workers: 2\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert (
        str(error.value) == f"{path}, line 4, column 3: not valid YAML: key 'workers' is given twice (first in line 3)"
    )


def test_a_merged_key_may_be_given_again(tmp_path: Path) -> None:
    path = written(tmp_path, "task: {name: arithmetic}\nrollout: {<<: {workers: 1, top_k: 0}, workers: 2}\n")
    assert load_config(path).rollout.workers == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: [", ", line 1, column 8: not valid YAML: "),
        ("task:\n\tname: arithmetic", ", line 2, column 1: not valid YAML: "),
        ("a: b: c", ", line 1, column 5: not valid YAML: mapping values are not allowed here"),
        ("a: !!python/name:os.system", ", line 1, column 4: not valid YAML: could not determine a constructor"),
        ("seed: 1\n---\nseed: 2", ", line 2, column 1: not valid YAML: expected a single document"),
        ("seed: \x01", ": not valid YAML: unacceptable character"),
        ("seed: 2024-13-45", ": not valid YAML: month must be in 1..12"),
        ("", ": the file is empty; "),
        ("# nothing yet\n", ": the file is empty; "),
        ("- task", ": expected sections (`key: value`), found ['task']"),
        ("arithmetic", ": expected sections (`key: value`), found 'arithmetic'"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}{said}")


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: \xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(path)


def test_a_missing_file_is_answered_with_those_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    for name in ("quickstart", "jsonl"):
        (tmp_path / "configs" / f"{name}.yaml").touch()
    monkeypatch.chdir(tmp_path)
    for asked, said in {
        "configs/quikstart.yaml": "; did you mean configs/quickstart.yaml?",
        "quickstart.yaml": "; did you mean configs/quickstart.yaml?",
        "other.yaml": "; there are configs/jsonl.yaml, configs/quickstart.yaml",
    }.items():
        with pytest.raises(ConfigError) as error:
            load_config(asked)
        assert str(error.value) == f"{asked}: no such file{said}"


def test_an_error_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "task: {name: arithmetic}\nseed: x\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: 1 problem\n  seed='x': must be a whole number"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_configuration_is_valid_and_names_files_that_exist(path: Path) -> None:
    config = load_config(path)
    if isinstance(config.task, JsonlTask):
        rows = (ROOT / config.task.path).read_text().count("\n")
        assert rows > config.task.eval_size


# Writing


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_what_is_written_reads_back_as_the_same(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["learner.lr=1e-7", "objective.correction={name: tis, cap: 2}"])
    assert load_config(written(tmp_path, dump_config(config))) == config


@given(st.text())
@example("1e-4")
@example("-2E+3")
@example("0x1F")
@example("12:30:45")
@example("2024-05-06")
@example("~")
@example("no")
@example("a\x85\u2028\r\n: #")
def test_a_text_reads_back_as_the_same_text_whatever_it_looks_like(text: str) -> None:
    config = parse_config({**SMALLEST, "rollout": {"engine_options": {"x": text, f"of {text}": [text]}}})
    assert parse_config(_parse_yaml(dump_config(config), "written")) == config


def test_a_run_that_is_named_like_a_number_can_be_continued(tmp_path: Path) -> None:
    config = parse_config({**SMALLEST, "name": "1e-4"})
    assert load_config(written(tmp_path, dump_config(config))).name == "1e-4"


def test_everything_is_written_in_the_order_of_the_schema() -> None:
    data = yaml.safe_load(dump_config(parse_config(SMALLEST)))
    assert list(data) == list(RunConfig.model_fields)
    assert data["rollout"]["workers"] == 1
    assert data["model"]["warmstart"]["cache_dir"] == ".cache/warmstart"


def test_reading_a_configuration_loads_no_heavy_library() -> None:
    code = (
        "import sys, rlsys.config as c; c.parse_config({'task': {'name': 'arithmetic'}});"
        "print(sorted({'ray', 'torch', 'vllm', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
