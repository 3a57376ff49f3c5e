"""Two-layer models of width 32, and learners on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsys.config.schema import AdvantageConfig, KLConfig, LearnerConfig, ModelConfig, ObjectiveConfig, TinyModelConfig
from rlsys.learning.learner import Learner
from rlsys.learning.tiny import make_tiny
from tests.unit.learning.samples import ALPHABET, sharpen


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., TinyModelConfig]:
    def make(**options: Any) -> TinyModelConfig:
        small = {
            "hidden_size": 32,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "intermediate_size": 48,
            "max_positions": 64,
        }
        return TinyModelConfig(**(small | options))

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tiny_config) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_tiny(tiny_config(), ALPHABET, path, seed=3)
    sharpen(path)
    return path


@pytest.fixture(scope="session")
def untied(tmp_path_factory, tiny_config) -> Path:
    path = tmp_path_factory.mktemp("untied")
    make_tiny(tiny_config(tie_embeddings=False), ALPHABET, path, seed=4)
    sharpen(path)
    return path


@pytest.fixture
def make_learner(tiny) -> Callable[..., Learner]:
    """Learner on the tiny model; `learner`, `objective`, `kl`, `advantage` are dictionaries of options."""

    def make(path: Path | None = None, **options: Any) -> Learner:
        sections: dict[str, Any] = {
            "learner": LearnerConfig(
                **{"steps": 20, "warmup_steps": 0, "row_tokens": 32, **options.pop("learner", {})}
            ),
            "objective": ObjectiveConfig(**options.pop("objective", {})),
            "advantage": AdvantageConfig(**options.pop("advantage", {})),
            "kl": KLConfig(**options.pop("kl", {})),
            "model": ModelConfig(**options.pop("model", {})),
        }
        rest: dict[str, Any] = {"temperature": 1.0, "staleness_max": 8, "max_new_tokens": 8} | options
        return Learner(path or tiny, **sections, **rest)

    return make
