"""From a YAML file and dotted overrides to a checked `RunConfig`, or to one error that lists every mistake."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlsys.config.problems import describe, show
from rlsys.config.schema import RunConfig
from rlsys.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply overrides such as `rollout.workers=2`, and check the result.

    Relative paths inside a configuration are taken from the working directory, not from the file's place.
    Raises `ConfigError`, which names the file and every mistake in it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_files_like(path)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    data = _parse_yaml(text, str(path))
    if data is None:
        raise ConfigError(f"{path}: the file is empty; the smallest configuration is `task: {{name: arithmetic}}`")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected sections (`key: value`), found {show(data)}")
    return parse_config(data, overrides, source=str(path))


def parse_config(data: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "configuration") -> RunConfig:
    """Check a mapping as it would stand in YAML. `source` is what error messages call it."""
    merged = copy.deepcopy(dict(data))
    for override in overrides:
        _apply(override, merged)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_listed(source, describe(error, RunConfig))) from None


def dump_config(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML in the order of the schema. `load_config` reads it back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _listed(source: str, problems: Sequence[str]) -> str:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n  ".join([f"{source}: {count}", *problems])


def _apply(override: str, data: dict[str, Any]) -> None:
    """Set one `section.field=value` in place. Whether the field exists is for the schema to say."""
    dotted, equals, text = override.partition("=")
    *parents, last = keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected section.field=value, for example rollout.workers=2")
    section = data
    for depth, key in enumerate(parents, start=1):
        below = section.get(key)
        if below is None:  # not in the file, or an empty `section:` there
            below = section[key] = {}
        if not isinstance(below, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parents[:depth])} is {show(below)}, a value and not a section, "
                f"so it has no field {keys[depth]!r}"
            )
        section = below
    section[last] = _parse_yaml(text, f"override {override!r}")


def _files_like(path: Path) -> str:
    """A hint for a mistyped file name: the nearest one in its directory and in configs/, or all that are there."""
    present = sorted({str(p) for d in (path.parent, Path("configs")) for p in d.glob("*.yaml")})
    if near := get_close_matches(str(path), present, n=1, cutoff=0.75):
        return f"; did you mean {near[0]}?"
    by_stem = [p for p in present if Path(p).stem == path.stem]
    if by_stem or present:
        return f"; there are {', '.join(by_stem or present)}"
    return ""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads `1e-3` as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _refuse_duplicates(key for key, _ in node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts in quotes what `_Loader` would otherwise read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _refuse_duplicates(keys: Iterable[yaml.Node]) -> None:
    first: dict[str, yaml.Node] = {}
    for key in keys:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.value in first:
            line = first[key.value].start_mark.line + 1
            raise yaml.MarkedYAMLError(
                problem=f"key {key.value!r} is given twice (first in line {line})", problem_mark=key.start_mark
            )
        first[key.value] = key


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}{where}: not valid YAML: {what}") from None
    except (yaml.YAMLError, ValueError) as error:  # a forbidden character; an impossible date
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
