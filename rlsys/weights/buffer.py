"""The bytes of a version: written once by the learner, checked by everyone who serves them."""

import warnings
from collections.abc import Iterable
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from rlsys.errors import ChecksumMismatch, WeightSyncError
from rlsys.versions import PolicyVersion, WeightManifest
from rlsys.weights.layout import plan_layout

Bytes = npt.NDArray[np.uint8]
"""A version's bytes in host memory, one-dimensional and contiguous. On a GPU they are a uint8 `Tensor`."""

CHUNK = 1 << 22
"""Words that `word_sums` weighs at a time: its scratch memory is 64 MiB, whatever the model's size."""


def checksum(buffer: Bytes | Tensor) -> str:
    """In hexadecimal, of the whole buffer: XXH3-64 in host memory, `word_sums` where the bytes lie on a GPU.

    Both ends of a transport keep them in the same kind of memory.
    """
    if isinstance(buffer, Tensor):
        return word_sums(buffer) if buffer.is_cuda else checksum(buffer.numpy())
    return xxhash.xxh3_64_hexdigest(buffer.data)


def word_sums(buffer: Tensor) -> str:
    """Σ wᵢ and Σ (i+1)·wᵢ mod 2⁶⁴ over the buffer's 64-bit words, the last one filled up with zeros.

    Integer sums are exact in any order, so every device finds the same. The first sees every change of one word, the
    second those of several that cancel in the first, two words that changed places among them.
    """
    padded = torch.nn.functional.pad(buffer, (0, -buffer.numel() % 8)) if buffer.numel() % 8 else buffer
    words = padded.view(torch.int64)
    plain = weighted = torch.zeros((), dtype=torch.int64, device=buffer.device)
    for start in range(0, words.numel(), CHUNK):
        chunk = words[start : start + CHUNK]
        place = torch.arange(start + 1, start + 1 + chunk.numel(), device=buffer.device)
        plain, weighted = plain + chunk.sum(), weighted + (chunk * place).sum()
    return "".join(f"{int(total) % (1 << 64):016x}" for total in (plain, weighted))


def verify(manifest: WeightManifest, buffer: Bytes | Tensor) -> None:
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
    """Copies a model's parameters into one preallocated buffer, casting to the engine's dtype.

    With `buffers` it takes them in turn: a version stays whole while the `buffers` − 1 after it are packed.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        dtype: str,
        vocab_size: int,
        device: str = "cpu",
        buffers: int = 1,
    ) -> None:
        shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors]
        self.layout, self.nbytes = plan_layout(shapes, dtype=dtype, vocab_size=vocab_size)
        self._buffers = cycle([torch.zeros(self.nbytes, dtype=torch.uint8, device=device) for _ in range(buffers)])
        self._slots = {slot.name: slot for slot in self.layout}

    def pack(self, tensors: Iterable[tuple[str, Tensor]], version: PolicyVersion) -> tuple[WeightManifest, Any]:
        """Fill the next buffer and describe it. Returned are `Bytes`, or the tensor where they lie on a GPU."""
        filled, missing = next(self._buffers), set(self._slots)
        for name, tensor in tensors:
            slot = self._slots.get(name)
            if slot is None or tuple(tensor.shape) != slot.shape:
                raise WeightSyncError(f"parameter {name} {tuple(tensor.shape)} is not in the weight layout")
            slot.view(filled).copy_(tensor.detach())
            missing.discard(name)
        if missing:
            raise WeightSyncError(f"parameters missing from version {version}: {', '.join(sorted(missing)[:3])}")
        buffer = filled.numpy() if filled.device.type == "cpu" else filled
        manifest = WeightManifest(version=version, layout=self.layout, nbytes=self.nbytes, checksum=checksum(buffer))
        return manifest, buffer
