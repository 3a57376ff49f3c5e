"""Where every parameter lies in the flat weight buffer.

Inference engines fuse some projections (q, k, v; gate, up) and pad the vocabulary. When the buffer
already has those tensors side by side and the padding in place, an engine serves a new version by
pointing at the buffer: nothing is copied.
"""

from collections.abc import Iterable
from math import prod

from rlsys.versions import VOCAB_MULTIPLE, TensorSlot

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Hugging Face projection -> the engine's fused one, whose parts lie in this order."""

ALIGNMENT = 64
"""Bytes; every fused block starts at a multiple of it."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def fused_name(name: str) -> str:
    """Name of the engine parameter that holds `name`.

    >>> fused_name("model.layers.0.self_attn.k_proj.weight")
    'model.layers.0.self_attn.qkv_proj.weight'
    """
    return ".".join(FUSED.get(part, part) for part in name.split("."))


def plan_layout(
    tensors: Iterable[tuple[str, tuple[int, ...]]], *, dtype: str, vocab_size: int
) -> tuple[tuple[TensorSlot, ...], int]:
    """Slots for all (name, shape), fused parts adjacent, and the buffer's size in bytes.

    An unfused matrix with `vocab_size` rows is followed by room for zeros up to a multiple of 64 rows.
    """
    blocks: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in tensors:
        blocks.setdefault(fused_name(name), []).append((name, shape))
    order = list(FUSED)
    slots: list[TensorSlot] = []
    offset = 0
    for parts in blocks.values():
        offset += -offset % ALIGNMENT
        for name, shape in sorted(parts, key=lambda part: _rank(part[0], order)):
            nbytes = prod(shape) * ITEM_BYTES[dtype]
            slots.append(TensorSlot(name=name, dtype=dtype, shape=shape, offset=offset, nbytes=nbytes))
            offset += nbytes
            if len(parts) == 1 and len(shape) == 2 and shape[0] == vocab_size:
                offset += (-shape[0] % VOCAB_MULTIPLE) * shape[1] * ITEM_BYTES[dtype]
    return tuple(slots), offset


def _rank(name: str, order: list[str]) -> int:
    return next((order.index(part) for part in name.split(".") if part in order), 0)
