"""Everything a learner is, written whole or not at all.

    <directory>/
      config.json  generation_config.json  model.safetensors  tokenizer*.json     a Hugging Face model: serve it
      trainer/optimizer.safetensors                                             moments and masters
      trainer/state.json                                                        versions, caller's state, file sizes

Written to a hidden sibling, flushed to disk, then renamed: a directory with the final name is complete, and
`state.json` repeats the size of every file so that a damaged one is noticed before a run continues from it.
No pickle anywhere.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlsys.errors import CheckpointError
from rlsys.learning.learner import Learner, LearnerState
from rlsys.learning.policy import load_tokenizer, quiet
from rlsys.versions import PolicyVersion

FORMAT = 1
CHECKPOINTS = "checkpoints"
"""Where a run's directory keeps them."""
_ASIDE = ".aside"
_STATE = Path("trainer") / "state.json"
_OPTIMIZER = Path("trainer") / "optimizer.safetensors"


def save(
    directory: Path, learner: Learner, *, tokenizer_from: str | Path, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write `directory` atomically and return it, in place of an older one of that name if there is one.

    Of several ranks all have to call this, and the first one writes. How many there were cannot be seen in it.
    `tokenizer_from` is the directory whose tokenizer goes with the model; `extra` are JSON values committed
    together with the learner. Raises CheckpointError when it cannot be written (a full disk, say): then
    nothing is left behind and what was there before still loads.
    """
    state = learner.state()
    tensors = dict(learner.named_tensors())
    if learner.ranks.rank > 0:
        return directory
    tensors |= {name: tensors[original] for name, original in learner.tied_names().items()}
    tokenizer = load_tokenizer(tokenizer_from)

    def write(temporary: Path) -> None:
        (temporary / "trainer").mkdir()
        with quiet():
            learner.policy.model.save_pretrained(temporary, state_dict=tensors)
            tokenizer.save_pretrained(temporary)
        save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, temporary / _OPTIMIZER)
        description = {
            "format": FORMAT,
            "version": state.version,
            "seed": state.seed,
            "kl_coef": state.kl_coef,
            "refused": state.refused,
            "extra": dict(extra or {}),
            "files": {str(p.relative_to(temporary)): p.stat().st_size for p in _files(temporary)},
        }
        (temporary / _STATE).write_text(json.dumps(description, indent=1, allow_nan=False))

    try:
        write_atomically(directory, write)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory} could not be written: {error}") from error
    return directory


def load(directory: Path) -> LearnerState:
    """Read and verify: build a `Learner(directory, ...)`, then `learner.load_state` this.

    Raises CheckpointError when it is missing, partial, damaged or of another format.
    """
    description = _describe(directory)
    for name, size in description["files"].items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else None
        if found != size:
            raise CheckpointError(
                f"checkpoint {directory} is damaged: {name} "
                + ("is missing" if found is None else f"has {found} bytes, not {size}")
            )
    try:
        tensors = load_file(directory / _OPTIMIZER)
        return LearnerState(
            version=description["version"],
            seed=description["seed"],
            kl_coef=description["kl_coef"],
            refused=description["refused"],
            tensors=tensors,
        )
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"checkpoint {directory} is damaged: {error}") from error


def latest(run_dir: Path) -> Path | None:
    """The complete checkpoint of a run with the highest version, or None; partial ones don't count.

    Those of a run lie in its directory `checkpoints`.
    """
    complete = _complete(run_dir)
    return complete[-1][1] if complete else None


def prune(run_dir: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` newest complete checkpoints, and what interrupted writes left. Returns the deleted."""
    outdated = [path for _, path in _complete(run_dir)][: -keep or None]
    complete = {path for _, path in _complete(run_dir)}
    outdated += [path for path in (run_dir / CHECKPOINTS).glob(".*") if path not in complete]
    for path in outdated:
        shutil.rmtree(path)
    return outdated


def write_atomically(directory: Path, write: Callable[[Path], object], *, replace: bool = True) -> None:
    """Let `write` fill a hidden sibling of `directory`, flush it, and give it its name; on an error, remove it.

    What had the name before is set aside for the instant between two renames, then deleted; without `replace`
    it stays, and FileExistsError is raised.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}.partial"
    aside = directory.parent / f".{directory.name}{_ASIDE}"
    temporary.mkdir()
    try:
        write(temporary)
        for path in [*_files(temporary), *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
            _flush(path)
        if directory.exists():
            if not replace:
                raise FileExistsError(directory)
            shutil.rmtree(aside, ignore_errors=True)
            directory.rename(aside)
        temporary.rename(directory)
        _flush(directory.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _complete(run_dir: Path) -> list[tuple[PolicyVersion, Path]]:
    """Complete checkpoints by version; one set aside counts while nothing has its name (a kill between two renames)."""
    parent = run_dir / CHECKPOINTS
    paths = {path.name: path for path in (parent.iterdir() if parent.is_dir() else ())}
    found = []
    for name, path in paths.items():
        shown = name.removeprefix(".").removesuffix(_ASIDE) if name.endswith(_ASIDE) else name
        if name.startswith(".") and (shown == name or shown in paths):
            continue
        try:
            found.append((int(_describe(path)["version"]), path))
        except CheckpointError:
            continue
    return sorted(found)


def _describe(directory: Path) -> dict[str, Any]:
    path = directory / _STATE
    try:
        description: dict[str, Any] = json.loads(path.read_text())
        if description["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {directory} has format {description['format']}, this version reads {FORMAT}"
            )
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is no complete checkpoint: it has no {_STATE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return description


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
