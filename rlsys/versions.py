"""Which parameters: policy versions, the spans of a response they sampled, and the manifest of their bytes.

Three numbers must never be confused: the *learner version* (optimizer steps taken), the *published
version* (newest one a rollout worker acknowledged) and the *serving version* (what one worker samples
from right now). All three are a `PolicyVersion`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VOCAB_MULTIPLE = 64
"""Engines pad embedding and output rows to a multiple of this; in a weight buffer the padding is zero."""

PolicyVersion = int
"""Number of optimizer steps behind a set of parameters; 0 is the initial policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens `start:stop` of one response were sampled by `version`.

    >>> VersionSpan(start=0, stop=7, version=3)
    VersionSpan(start=0, stop=7, version=3)
    """

    start: int
    stop: int
    version: PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlot:
    """Where one parameter lies in the flat weight buffer (`offset` and `nbytes` in bytes).

    `dtype` is torch's name without the prefix ("float32").
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def view(self, buffer: Tensor) -> Tensor:
        """This parameter inside a uint8 buffer, without a copy."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return buffer[self.offset : self.offset + self.nbytes].view(dtype).view(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """What a published version consists of; a worker serves it only when `checksum` holds.

    `layout` is the order of tensors in one contiguous buffer of `nbytes`; `checksum` is the
    XXH3-64 digest of that buffer.
    """

    version: PolicyVersion
    layout: tuple[TensorSlot, ...]
    nbytes: int
    checksum: str
