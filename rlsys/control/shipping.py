"""What travels with a submitted run: its resolved configuration, this package, the user's own code, and data files.

Never an environment: the cluster has Python, torch, vLLM and what else they need. What it lacks, it says.
"""

import contextlib
import json
import os
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from rlsys.config.load import dump_config, parse_config
from rlsys.config.schema import JsonlTask, RunConfig
from rlsys.control.preflight import check_config
from rlsys.errors import ConfigError

CONFIG = "submitted.yaml"
"""The resolved configuration's name among what travels."""

LIMIT_MIB = 100
"""The head keeps what travels in its memory. More belongs on storage that the cluster shares."""

LEFT_BEHIND = shutil.ignore_patterns("__pycache__", ".*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipment:
    """A run ready to travel."""

    config: RunConfig
    """As it will run there."""
    files: Mapping[Path, Path]
    """Files and directories here by the place they get, relative to the run's working directory there."""
    remarks: Sequence[str]

    def pack(self, target: Path) -> None:
        """Copy everything into an empty directory.

        Raises `ConfigError` when it is too much, before anything is copied, and for what cannot be.
        """
        sources: dict[Path, Path] = {}
        sizes: dict[Path, int] = {}
        for place, source in self.files.items():
            with _packing(source):
                found = dict(_files(place, source))
                sizes |= {file: path.stat().st_size for file, path in found.items()}
                sources |= found
        _require_small(sizes)
        for place, source in sources.items():
            with _packing(source):
                (target / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target / place)
        with _packing(Path(CONFIG)):
            (target / CONFIG).write_text(dump_config(self.config))


def prepare(config: RunConfig, *, here: Path, shared: bool, include: Sequence[Path] = ()) -> Shipment:
    """Check a configuration as far as that can be done here, and find what must travel with it.

    `shared`: the cluster is on this machine and sees the same files. Otherwise `run_dir` and a model's directory
    must be absolute paths that the cluster sees, and files below the working directory `here` travel.
    Raises `ConfigError` or `DataError`.
    """
    config, files = _settle_paths(config, here=here, shared=shared)
    remarks = check_config(config, elsewhere=not shared)
    files |= {_below(path, here, "--include"): here / path for path in include}
    files |= own_code(sys.modules)
    files[Path("rlsys")] = Path(__file__).parents[1]
    return Shipment(config=config, files=files, remarks=remarks)


def _settle_paths(config: RunConfig, *, here: Path, shared: bool) -> tuple[RunConfig, dict[Path, Path]]:
    """Make every path mean there what it means here, or refuse it; and the data files that must travel."""
    changes: dict[str, str] = {"resources.address": "auto"}
    files: dict[Path, Path] = {}
    if not config.run_dir.is_absolute():
        if not shared:
            raise ConfigError(
                f"run_dir={config.run_dir}: must be absolute for a cluster elsewhere, on storage that all its nodes "
                f"see, for example run_dir=/shared/{config.run_dir}"
            )
        changes["run_dir"] = str(here / config.run_dir)
    root = here / config.run_dir
    if config.model.path is None:
        cache = config.model.warmstart.cache_dir
        if not cache.is_absolute():  # every node loads the model that is made there
            changes["model.warmstart.cache_dir"] = str(here / cache if shared else root / ".warmstart")
    elif not Path(config.model.path).is_absolute() and (here / config.model.path).is_dir():
        if not shared:
            raise ConfigError(
                f"model.path={config.model.path}: a model does not travel with a run; give an absolute path that the "
                "cluster sees, or a hub name"
            )
        changes["model.path"] = str(here / config.model.path)
    if isinstance(config.task, JsonlTask):
        for field, path in (("task.path", config.task.path), ("task.eval_path", config.task.eval_path)):
            if path is not None and not path.is_absolute():
                place = _below(path, here, field)
                files[place], changes[field] = here / path, str(place)
    overrides = [f"{field}={json.dumps(value)}" for field, value in changes.items()]
    return parse_config(config.model_dump(mode="json"), overrides), files


def _below(path: Path, here: Path, field: str) -> Path:
    """The place of a file relative to the working directory. Raises `ConfigError` when it has none, or no file.

    It keeps the name that it is called by, also where that is a link: what is linked to travels in its place.
    """
    file, root = (here / path).resolve(), here.resolve()
    if not file.is_relative_to(root):
        raise ConfigError(
            f"{field}={path}: only files below the working directory travel with a run; submit from a directory above "
            "it, or give an absolute path that the cluster sees"
        )
    if not file.exists():
        raise ConfigError(f"{field}={path}: no such file")
    place = Path(os.path.normpath(here / path))
    return place.relative_to(here) if place.is_relative_to(here) else file.relative_to(root)


def own_code(modules: Mapping[str, ModuleType]) -> dict[Path, Path]:
    """The modules and whole packages that are not installed, by the place from which `import` finds them.

    They are known once the task and the reward have been imported, with everything these imported in turn.
    """
    found: dict[Path, Path] = {}
    for name, module in list(modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py") or name.partition(".")[0] in ("__main__", "rlsys"):
            continue
        path = Path(file).absolute()
        if _is_installed(path) or _is_installed(path.resolve()):
            continue
        depth = name.count(".") + (path.name == "__init__.py")  # directories between it and where import looks
        top = path.parts[-1 - depth]
        found[Path(top)] = path.parents[depth] / top
    return found


def _is_installed(path: Path) -> bool:
    paths = sysconfig.get_paths()
    ways = {paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(path.is_relative_to(way) for way in ways | {*site.getsitepackages(), site.getusersitepackages()})


def _files(place: Path, source: Path) -> Iterator[tuple[Path, Path]]:
    """Every file of what travels, by the place it gets. Raises `OSError` for a directory that cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    if not source.is_dir():
        yield place, source
        return
    for directory, below, files in os.walk(source, onerror=fail, followlinks=True):
        left = LEFT_BEHIND(directory, [*below, *files])
        below[:] = [name for name in below if name not in left]
        for name in files:
            if name not in left:
                path = Path(directory) / name
                yield place / path.relative_to(source), path


@contextlib.contextmanager
def _packing(path: Path) -> Iterator[None]:
    """Name what cannot be packed."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot pack {path}: {error}") from error


def _require_small(sizes: Mapping[Path, int]) -> None:
    total = sum(sizes.values()) / (1 << 20)
    if total > LIMIT_MIB:
        most = sorted(sizes, key=lambda place: sizes[place], reverse=True)[:3]
        largest = ", ".join(f"{place} ({sizes[place] / (1 << 20):.0f} MiB)" for place in most)
        raise ConfigError(
            f"{total:.0f} MiB would travel with this run, at most {LIMIT_MIB} can; largest: {largest}. Put large files "
            "on storage that the cluster sees, and give their absolute path"
        )
