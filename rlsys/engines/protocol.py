"""What a rollout worker asks of an inference engine."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from rlsys.records import FinishReason, FloatArray, IntArray
from rlsys.versions import PolicyVersion, VersionSpan, WeightManifest

if TYPE_CHECKING:
    from torch import Tensor

Buffer: TypeAlias = "npt.NDArray[np.uint8] | Tensor"
"""A version's bytes, one-dimensional and contiguous: in host memory, or a uint8 tensor on the engine's device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample: whole vocabulary at `temperature`, or the argmax when it is 0."""

    max_new_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One finished response of T tokens as the engine reports it.

    `logprobs` [T] are log μ after temperature; `version_spans` come from the engine's own weight
    versions and cover 0..T.
    """

    response_ids: IntArray
    logprobs: FloatArray
    version_spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyReport:
    """A version now served by one worker. Decoding stood still for `pause_s` seconds."""

    version: PolicyVersion
    pause_s: float
    verify_s: float = 0.0


class Engine(Protocol):
    """A continuous-batching engine, driven by one thread. Not thread-safe."""

    @property
    def serving_version(self) -> PolicyVersion:
        """Version every token of the next step will be sampled from."""

    @property
    def busy(self) -> bool:
        """Whether `step` would produce tokens."""

    def add(self, key: str, prompt_ids: tuple[int, ...], samples: int, sampling: Sampling) -> None:
        """Queue `samples` responses to one prompt. Raises `EngineError` when it can never fit."""

    def step(self) -> list[tuple[str, list[Sampled]]]:
        """Decode one token for every running response; return the groups that finished."""

    def apply(self, manifest: WeightManifest, buffer: Buffer) -> None:
        """Serve the manifest's version from the next step on.

        Raises `WeightSyncError` when it is refused and the old one is left as it was. After any other error what would
        be served is unknown: the engine must not be used again.
        """

    def shutdown(self) -> None:
        """Release the engine's resources."""
