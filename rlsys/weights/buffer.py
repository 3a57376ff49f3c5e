"""The bytes of a version: written once by the learner, checked by everyone who serves them."""

import warnings
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from rlsys.errors import ChecksumMismatch, WeightSyncError
from rlsys.versions import PolicyVersion, WeightManifest
from rlsys.weights.layout import plan_layout

Bytes = npt.NDArray[np.uint8]
"""A version's bytes, one-dimensional and contiguous."""


def checksum(buffer: Bytes) -> str:
    """XXH3-64 of the whole buffer, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(buffer.data)


def verify(manifest: WeightManifest, buffer: Bytes) -> None:
    """Raise `ChecksumMismatch` unless `buffer` is exactly what `manifest` describes."""
    if buffer.nbytes != manifest.nbytes:
        raise ChecksumMismatch(
            f"version {manifest.version}: {buffer.nbytes} bytes arrived, {manifest.nbytes} were sent"
        )
    found = checksum(buffer)
    if found != manifest.checksum:
        raise ChecksumMismatch(f"version {manifest.version}: checksum {found} arrived, {manifest.checksum} was sent")


def unpack(manifest: WeightManifest, buffer: Bytes, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy a version's bytes over a model's named tensors, cast to their dtype: the inverse of `WeightPacker.pack`.

    Raises `ChecksumMismatch` unless the bytes are what `manifest` describes, `WeightSyncError` when they are another
    model's.
    """
    verify(manifest, buffer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # and is only read
        flat = torch.frombuffer(buffer, dtype=torch.uint8)
    slots = {slot.name: slot for slot in manifest.layout}
    for name, tensor in tensors:
        slot = slots.pop(name, None)
        if slot is None or slot.shape != tuple(tensor.shape):
            raise WeightSyncError(f"version {manifest.version} holds no parameter {name} {tuple(tensor.shape)}")
        tensor.detach().copy_(slot.view(flat))
    if slots:
        raise WeightSyncError(
            f"version {manifest.version} holds parameters of another model: {', '.join(sorted(slots)[:3])}"
        )


class WeightPacker:
    """Copies a model's parameters into one preallocated buffer, casting to the engine's dtype."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], *, dtype: str, vocab_size: int) -> None:
        shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors]
        self.layout, self.nbytes = plan_layout(shapes, dtype=dtype, vocab_size=vocab_size)
        self._buffer = torch.zeros(self.nbytes, dtype=torch.uint8)
        self._slots = {slot.name: slot for slot in self.layout}

    def pack(self, tensors: Iterable[tuple[str, Tensor]], version: PolicyVersion) -> tuple[WeightManifest, Bytes]:
        """Fill the buffer and describe it. The buffer is reused by the next call."""
        missing = set(self._slots)
        for name, tensor in tensors:
            slot = self._slots.get(name)
            if slot is None or tuple(tensor.shape) != slot.shape:
                raise WeightSyncError(f"parameter {name} {tuple(tensor.shape)} is not in the weight layout")
            slot.view(self._buffer).copy_(tensor.detach())
            missing.discard(name)
        if missing:
            raise WeightSyncError(f"parameters missing from version {version}: {', '.join(sorted(missing)[:3])}")
        buffer = self._buffer.numpy()
        manifest = WeightManifest(version=version, layout=self.layout, nbytes=self.nbytes, checksum=checksum(buffer))
        return manifest, buffer
