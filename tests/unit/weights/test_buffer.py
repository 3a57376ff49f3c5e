"""One buffer holds a version as engines want it, and its checksum refuses anything else."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.errors import ChecksumMismatch, WeightSyncError
from rlsys.versions import TensorSlot
from rlsys.weights import buffer as module
from rlsys.weights.buffer import WeightPacker, checksum, unpack, verify, word_sums
from rlsys.weights.layout import ALIGNMENT, fused_name, plan_layout

ATTENTION = "model.layers.0.self_attn"
SHAPES = {
    "model.embed_tokens.weight": (10, 4),
    f"{ATTENTION}.v_proj.weight": (2, 4),
    f"{ATTENTION}.v_proj.bias": (2,),
    f"{ATTENTION}.q_proj.weight": (4, 4),
    f"{ATTENTION}.q_proj.bias": (4,),
    f"{ATTENTION}.o_proj.weight": (4, 4),
    f"{ATTENTION}.k_proj.weight": (2, 4),
    f"{ATTENTION}.k_proj.bias": (2,),
    "model.layers.0.mlp.up_proj.weight": (3, 4),
    "model.layers.0.mlp.gate_proj.weight": (3, 4),
    "model.norm.weight": (4,),
}


def slots(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: str = "float32", vocab: int = 10
) -> dict[str, TensorSlot]:
    layout, _ = plan_layout(shapes.items(), dtype=dtype, vocab_size=vocab)
    return {slot.name: slot for slot in layout}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def packer(dtype: str = "float32") -> WeightPacker:
    return WeightPacker(tensors().items(), dtype=dtype, vocab_size=10)


# Layout


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_q_k_v_lie_side_by_side_in_this_order_whatever_order_they_come_in(kind: str) -> None:
    found = slots()
    q, k, v = (found[f"{ATTENTION}.{part}_proj.{kind}"] for part in "qkv")
    assert q.offset % ALIGNMENT == 0
    assert k.offset == q.offset + q.nbytes
    assert v.offset == k.offset + k.nbytes


def test_gate_and_up_lie_side_by_side_in_this_order() -> None:
    found = slots()
    gate, up = (found[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert up.offset == gate.offset + gate.nbytes


def test_layers_are_not_fused_with_each_other() -> None:
    names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkv" for layer in (0, 1)]
    found = slots(dict.fromkeys(names, (4, 4)))
    for layer in (0, 1):
        q, k, v = (found[f"model.layers.{layer}.self_attn.{part}_proj.weight"].offset for part in "qkv")
        assert (k - q, v - k) == (64, 64)
    assert fused_name(names[0]) != fused_name(names[1])


def test_offsets_equal_the_hand_computed() -> None:
    """Float32: 10·4·4 = 160 B of embedding padded to 64 rows = 1024 B, then q 64 + k 32 + v 32, next block aligned."""
    shapes = {
        "embed.weight": (10, 4),
        "q_proj.weight": (4, 4),
        "k_proj.weight": (2, 4),
        "v_proj.weight": (2, 4),
        "norm.weight": (3,),
        "last.weight": (1,),
    }
    layout, size = plan_layout(shapes.items(), dtype="float32", vocab_size=10)
    assert [slot.offset for slot in layout] == [0, 1024, 1088, 1120, 1152, 1216]
    assert [slot.nbytes for slot in layout] == [160, 64, 32, 32, 12, 4]
    assert size == 1220
    _, half = plan_layout(shapes.items(), dtype="bfloat16", vocab_size=10)
    assert half == 512 + 64 + 64 + 2  # embedding, qkv, norm aligned, last


def test_a_fused_part_with_as_many_rows_as_the_vocabulary_stays_beside_its_neighbours() -> None:
    shapes = {"embed.weight": (10, 4), "gate_proj.weight": (10, 4), "up_proj.weight": (10, 4)}
    found = slots(shapes)
    assert found["gate_proj.weight"].offset == 1024
    assert found["up_proj.weight"].offset == 1024 + 160


PARTS = [f"{part}_proj.{kind}" for part in ("q", "k", "v", "o", "gate", "up") for kind in ("weight", "bias")]


@given(
    st.dictionaries(st.sampled_from(PARTS), st.lists(st.integers(1, 70), min_size=1, max_size=2).map(tuple)),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(1, 70),
)
def test_no_two_tensors_overlap_and_all_lie_inside(shapes, dtype, vocab) -> None:
    layout, size = plan_layout(shapes.items(), dtype=dtype, vocab_size=vocab)
    assert {slot.name: slot.shape for slot in layout} == shapes
    edges = sorted((slot.offset, slot.offset + slot.nbytes) for slot in layout)
    for (_, stop), (start, _) in pairwise([*edges, (size, size)]):
        assert stop <= start


# Packing


def extended(slot: TensorSlot, rows: int) -> TensorSlot:
    """The slot with more rows, reaching into what follows it."""
    return replace(slot, shape=(rows, *slot.shape[1:]), nbytes=slot.nbytes // slot.shape[0] * rows)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_what_was_packed_is_what_is_viewed(dtype: str, torch_dtype: torch.dtype) -> None:
    weights = tensors()
    manifest, buffer = packer(dtype).pack(weights.items(), 3)
    assert manifest.version == 3
    assert buffer.nbytes == manifest.nbytes
    verify(manifest, buffer)
    for slot in manifest.layout:
        assert torch.equal(slot.view(torch.from_numpy(buffer)), weights[slot.name].to(torch_dtype))


def test_fused_parts_read_as_one_matrix() -> None:
    weights = tensors()
    manifest, buffer = packer().pack(weights.items(), 0)
    found = {slot.name: slot for slot in manifest.layout}
    fused = extended(found[f"{ATTENTION}.q_proj.weight"], rows=8).view(torch.from_numpy(buffer))
    assert torch.equal(fused, torch.cat([weights[f"{ATTENTION}.{part}_proj.weight"] for part in "qkv"]))


def test_the_vocabulary_is_padded_with_zeros_also_in_a_reused_buffer() -> None:
    pack = packer()
    for seed in (0, 1):
        manifest, buffer = pack.pack(tensors(seed).items(), seed)
        embedding = extended(manifest.layout[0], rows=64).view(torch.from_numpy(buffer))
        assert torch.equal(embedding[:10], tensors(seed)["model.embed_tokens.weight"])
        assert not embedding[10:].any()


def test_an_untied_head_is_padded_like_the_embedding_and_a_tied_one_is_not_there() -> None:
    """The learner gives tied tensors once, under the embedding's name."""
    untied = slots({"embed.weight": (10, 4), "norm.weight": (4,), "lm_head.weight": (10, 4)})
    assert [slot.offset for slot in untied.values()] == [0, 1024, 1088]
    _, size = plan_layout(
        {"embed.weight": (10, 4), "norm.weight": (4,), "lm_head.weight": (10, 4)}.items(),
        dtype="float32",
        vocab_size=10,
    )
    assert size == 1088 + 1024
    assert list(slots({"embed.weight": (10, 4)})) == ["embed.weight"]


def test_a_parameter_too_few_too_many_or_of_another_shape_is_refused() -> None:
    weights = tensors()
    first, *rest = weights.items()
    with pytest.raises(WeightSyncError, match=r"missing from version 5: model\.embed_tokens\.weight"):
        packer().pack(rest, 5)
    with pytest.raises(WeightSyncError, match="extra"):
        packer().pack([first, *rest, ("extra", torch.zeros(1))], 5)
    with pytest.raises(WeightSyncError, match=r"embed_tokens.*\(9, 4\)"):
        packer().pack([(first[0], torch.zeros(9, 4)), *rest], 5)


# Checksum


@given(st.data(), st.integers(1, 255))
def test_any_changed_byte_is_refused(data, flip) -> None:
    manifest, buffer = packer().pack(tensors().items(), 2)
    broken = buffer.copy()
    broken[data.draw(st.integers(0, buffer.nbytes - 1))] ^= flip
    with pytest.raises(ChecksumMismatch, match="version 2: checksum"):
        verify(manifest, broken)


def test_a_truncated_or_longer_payload_is_refused() -> None:
    manifest, buffer = packer().pack(tensors().items(), 2)
    with pytest.raises(ChecksumMismatch, match=f"{buffer.nbytes - 1} bytes arrived, {buffer.nbytes} were sent"):
        verify(manifest, buffer[:-1])
    with pytest.raises(ChecksumMismatch, match=f"{buffer.nbytes + 1} bytes arrived"):
        verify(manifest, np.append(buffer, np.uint8(0)))


def test_the_checksum_belongs_to_the_parameters_alone() -> None:
    one, two = packer(), packer()
    first = one.pack(tensors(0).items(), 1)[0].checksum
    one.pack(tensors(1).items(), 2)
    assert one.pack(tensors(0).items(), 3)[0].checksum == first == two.pack(tensors(0).items(), 9)[0].checksum
    assert two.pack(tensors(1).items(), 1)[0].checksum != first
    assert checksum(np.zeros(0, dtype=np.uint8)) == "2d06800538d394c2"  # XXH3-64 of nothing, by its specification


# Sums over words, for bytes on a GPU


def test_word_sums_equal_the_hand_computed() -> None:
    """Words 1, 2 and, filled up with zeros, 3: 1+2+3 = 6, 1·1 + 2·2 + 3·3 = 14."""
    words = torch.tensor([1, 2, 3], dtype=torch.int64).view(torch.uint8)
    assert word_sums(words) == word_sums(words[:17]) == f"{6:016x}{14:016x}"
    largest = torch.full((16,), 255, dtype=torch.uint8)  # two words of 2^64 - 1, which is -1: -2 and -3
    assert word_sums(largest) == f"{(1 << 64) - 2:016x}{(1 << 64) - 3:016x}"
    assert word_sums(torch.zeros(0, dtype=torch.uint8)) == "0" * 32


@given(st.binary(min_size=1, max_size=200), st.data())
def test_word_sums_see_changed_swapped_and_missing_words(data: bytes, draw) -> None:
    original = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    changed = original.clone()
    changed[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    assert word_sums(changed) != word_sums(original)
    if len(data) >= 16 and data[:8] != data[8:16]:
        swapped = torch.cat([original[8:16], original[:8], original[16:]])
        assert word_sums(swapped) != word_sums(original)


def test_word_sums_do_not_depend_on_how_many_are_added_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = torch.randint(0, 256, (10_007,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = word_sums(buffer)
    monkeypatch.setattr(module, "CHUNK", 100)
    assert word_sums(buffer) == whole


def test_a_tensor_in_host_memory_has_the_checksum_of_its_bytes() -> None:
    manifest, buffer = packer().pack(tensors().items(), 2)
    assert checksum(torch.from_numpy(buffer)) == manifest.checksum
    verify(manifest, torch.from_numpy(buffer))


def test_with_two_buffers_a_version_stays_whole_while_the_next_is_packed() -> None:
    pack = WeightPacker(tensors().items(), dtype="float32", vocab_size=10, buffers=2)
    versions = [pack.pack(tensors(seed).items(), seed) for seed in range(3)]
    for manifest, buffer in versions[1:]:
        verify(manifest, buffer)
    with pytest.raises(ChecksumMismatch, match="version 0"):
        verify(*versions[0])


# Unpacking


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unpacking_restores_every_tensor_in_the_models_own_dtype(dtype: str) -> None:
    sent = tensors(1)
    manifest, buffer = packer(dtype).pack(sent.items(), 7)
    buffer.setflags(write=False)
    received = tensors(2)
    unpack(manifest, buffer, received.items())
    for name, tensor in received.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, sent[name].to(getattr(torch, dtype)).float())


def test_bytes_of_another_model_are_refused() -> None:
    manifest, buffer = packer().pack(tensors(1).items(), 7)
    with pytest.raises(WeightSyncError, match=r"version 7 holds no parameter model\.norm\.weight \(5,\)"):
        unpack(manifest, buffer, {**tensors(), "model.norm.weight": torch.zeros(5)}.items())
    with pytest.raises(WeightSyncError, match=r"version 7 holds no parameter other \(4,\)"):
        unpack(manifest, buffer, {**tensors(), "other": torch.zeros(4)}.items())
    fewer = {name: tensor for name, tensor in tensors().items() if name != "model.norm.weight"}
    with pytest.raises(WeightSyncError, match=r"parameters of another model: model\.norm\.weight"):
        unpack(manifest, buffer, fewer.items())


def test_damaged_bytes_are_not_unpacked() -> None:
    manifest, buffer = packer().pack(tensors(1).items(), 7)
    buffer[3] ^= 1
    before, received = tensors(2), tensors(2)
    with pytest.raises(ChecksumMismatch):
        unpack(manifest, buffer, received.items())
    assert all(torch.equal(before[name], tensor) for name, tensor in received.items())
