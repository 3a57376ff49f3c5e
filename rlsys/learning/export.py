"""A checkpoint's model as a plain Hugging Face directory, without the trainer's state."""

from pathlib import Path

import torch

from rlsys.errors import CheckpointError, ConfigError
from rlsys.learning.checkpoint import write_atomically
from rlsys.learning.policy import load_policy, load_tokenizer, quiet

DTYPES = ("float32", "bfloat16", "float16")


def export(checkpoint: Path, target: Path, dtype: str | None = None) -> Path:
    """Write model and tokenizer of `checkpoint` to a new directory `target`, cast to `dtype` if given.

    Raises CheckpointError when there is no model or `target` exists, ConfigError for an unknown dtype.
    """
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"{checkpoint} holds no model (no config.json); expected a run's checkpoints/step-*")
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another directory")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: allowed are {', '.join(DTYPES)}")
    policy = load_policy(checkpoint, "float32")
    tokenizer = load_tokenizer(checkpoint)

    def write(temporary: Path) -> None:
        model = policy.model if dtype is None else policy.model.to(getattr(torch, dtype))
        with quiet():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)

    write_atomically(target, write)
    return target
