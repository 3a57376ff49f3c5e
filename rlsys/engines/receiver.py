"""Takes a flat weight buffer into vLLM's model, through vLLM's own weight-transfer interface.

Two ways. *Pointing*: each engine parameter becomes a view of the buffer, when the layout has its parts
side by side (`weights.layout`); costs microseconds whatever the model's size, and needs the buffer to
stay alive as long as it is served. *Loading*: the model's own `load_weights` copies; works for every
architecture, dtype and device. The receiver points when it can do so for all parameters, else loads.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rlsys.errors import EngineError, WeightSyncError
from rlsys.versions import VOCAB_MULTIPLE, TensorSlot, WeightManifest

BACKEND = "rlsys_buffer"


@dataclass
class BufferInit(WeightTransferInitInfo):
    """Nothing to set up: the buffer is in this process."""


@dataclass
class BufferUpdate(WeightTransferUpdateInfo):
    """A verified version: its manifest and its bytes as a uint8 tensor."""

    manifest: WeightManifest
    buffer: torch.Tensor


class BufferReceiver(WeightTransferEngine[BufferInit, BufferUpdate]):
    """vLLM weight-transfer engine whose transport is memory this process can already read."""

    init_info_cls = BufferInit
    update_info_cls = BufferUpdate
    supports_draft_weight_update = False
    _layout: tuple[TensorSlot, ...] | None = None
    _views: list[tuple[torch.nn.Parameter, TensorSlot]] | None = None
    """Where each parameter lies in a buffer of that layout; None: load instead of pointing."""

    def init_transfer_engine(self, init_info: BufferInit) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """A single chunk carries the whole version, so there is nothing to prepare."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Serve the buffer's parameters.

        What the first version consists of, every later one must: one with other parameters is refused by a
        `WeightSyncError`, and changes nothing. Whatever else is raised may leave parameters of two versions.
        """
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # vLLM's own method synchronises always; there may be no accelerator
            torch.accelerator.synchronize()

    def receive_weights(self, update: BufferUpdate) -> None:
        """Point at the buffer, or load from it."""
        manifest = update.manifest
        if manifest.layout != self._layout:
            self._adopt(manifest)
        if self._views is not None:
            for parameter, slot in self._views:
                parameter.data = slot.view(update.buffer)
            self._served = update.buffer  # the views live as long as the buffer
            return
        loaded = self.model.load_weights((slot.name, slot.view(update.buffer)) for slot in manifest.layout)
        if missing := {name for name, _ in self.model.named_parameters()} - set(loaded or ()):
            raise EngineError(f"version {manifest.version}: the model still lacks {', '.join(sorted(missing)[:3])}")

    def finish_weight_update(self) -> None:
        """The version is complete when `update_weights` returns."""

    def shutdown(self) -> None:
        """Nothing to release."""

    def _adopt(self, manifest: WeightManifest) -> None:
        """Plan for a layout. Raises `WeightSyncError` when it has not the parameters of the one before."""
        old, new = ({(slot.name, slot.shape) for slot in layout or ()} for layout in (self._layout, manifest.layout))
        if self._layout is not None and old != new:
            names = ", ".join(sorted({name for name, _ in old ^ new})[:3])
            raise WeightSyncError(
                f"version {manifest.version}: its parameters differ from those of the version before: {names}"
            )
        self._views, self._layout = self._plan(manifest), manifest.layout

    def _plan(self, manifest: WeightManifest) -> list[tuple[torch.nn.Parameter, TensorSlot]] | None:
        """Each parameter of the model with the one slot it can view; None if any cannot be a view."""
        if self.device.type != "cpu" or self.parallel_config.world_size > 1:
            return None
        parts: dict[str, list[TensorSlot]] = {}
        mapping = getattr(self.model, "packed_modules_mapping", {})
        fused = {part: name for name, members in mapping.items() for part in members}
        for slot in manifest.layout:
            name = ".".join(fused.get(piece, piece) for piece in slot.name.split("."))
            parts.setdefault(name, []).append(slot)
        views: list[tuple[torch.nn.Parameter, TensorSlot]] = []
        for name, parameter in self.model.named_parameters():
            whole = _fuse(name, parts.pop(name, []), parameter, manifest.nbytes)
            if whole is None:
                return None
            views.append((parameter, whole))
        return views if not parts else None


def _fuse(name: str, slots: list[TensorSlot], parameter: torch.nn.Parameter, nbytes: int) -> TensorSlot | None:
    """One slot shaped like `parameter` over adjacent ones, reaching into vocabulary padding if that is longer."""
    dtype = str(parameter.dtype).removeprefix("torch.")
    if not slots or any(slot.dtype != dtype for slot in slots):
        return None
    shape, rows, start = tuple(parameter.shape), sum(slot.shape[0] for slot in slots), slots[0].offset
    adjacent = all(a.offset + a.nbytes == b.offset for a, b in pairwise(slots))
    padded = len(slots) == 1 and len(shape) == 2 and rows + -rows % VOCAB_MULTIPLE == shape[0]
    inside = start + parameter.nbytes <= nbytes
    if not (adjacent and inside) or shape[1:] != slots[0].shape[1:] or not (rows == shape[0] or padded):
        return None
    return TensorSlot(name=name, dtype=dtype, shape=shape, offset=start, nbytes=parameter.nbytes)


def register() -> None:
    """Make `BACKEND` known to vLLM; harmless when repeated."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, BufferReceiver)
