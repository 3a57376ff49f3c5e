"""An engine and the learner whose versions it serves, side by side, for tests that compare them."""

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from rlsys.config.schema import ModelConfig, RolloutConfig
from rlsys.engines.protocol import Sampled, Sampling
from rlsys.learning.packing import Sequences, pack
from rlsys.learning.policy import Policy, load_policy
from rlsys.records import FloatArray, IntArray
from rlsys.versions import TensorSlot, WeightManifest
from rlsys.weights.buffer import Bytes, WeightPacker, checksum

CONTEXT = 128
PROMPTS = [(3, 4, 12, 9, 13), (20,), tuple(range(5, 45))]

Published = tuple[WeightManifest, Bytes]
Responses = dict[tuple[int, ...], list[Sampled]]


class LearnerSide:
    """A policy whose parameters change, publishing versions and answering for all of them."""

    def __init__(self, directory: Path, dtype: str = "float32") -> None:
        self.policy: Policy = load_policy(directory, "float32")
        self.policy.model.requires_grad_(False)
        self._packer = WeightPacker(self.policy.named_tensors(), dtype=dtype, vocab_size=self.policy.vocab_size)
        self._random = torch.Generator().manual_seed(7)
        self._snapshots = [self._copy()]

    @property
    def version(self) -> int:
        return len(self._snapshots) - 1

    def change(self, part: str = "", scale: float = 0.05) -> None:
        """Make a new version: noise on the parameters whose name contains `part`."""
        self._use(self.version)
        touched = [tensor for name, tensor in self.policy.named_tensors() if part in name]
        assert touched, part
        for tensor in touched:
            tensor.add_(scale * torch.randn(tensor.shape, generator=self._random))
        self._snapshots.append(self._copy())

    def published(self) -> Published:
        """The newest version as a worker receives it: read-only bytes of its own."""
        self._use(self.version)
        manifest, buffer = self._packer.pack(self.policy.named_tensors(), self.version)
        return manifest, read_only(buffer)

    def logprobs(self, prompt: Sequence[int], response: IntArray, version: int, temperature: float = 1.0) -> FloatArray:
        """log π of the response's tokens as the learner computes them, [T]."""
        self._use(version)
        sequences = Sequences(prompts=[list(prompt)], responses=[response], prompt_of=[0])
        (micro,) = pack(sequences, row_tokens=64, micro_batch_tokens=4096).micro_batches
        with torch.no_grad():
            found = self.policy.token_logprobs(micro, temperature).logprobs
        result = np.zeros(len(response), dtype=np.float32)
        result[micro.token_index.numpy()] = found.numpy()
        return result

    def logprobs_with_kept_cache(self, prompt: Sequence[int], response: Sampled) -> FloatArray:
        """The same under the mixed policy: each span's version reads keys and values that older ones computed."""
        ids = [*prompt, *response.response_ids.tolist()]
        cache, result, fed = DynamicCache(), [], 0
        for span in response.version_spans:
            self._use(span.version)
            until = len(prompt) + span.stop - 1  # the last token of a span is fed when the next one is sampled
            with torch.no_grad():
                output = self.policy.model(torch.tensor([ids[fed:until]]), past_key_values=cache, use_cache=True)
            rows = torch.log_softmax(output.logits[0, -(span.stop - span.start) :], dim=-1)
            result += [float(row[ids[len(prompt) + span.start + i]]) for i, row in enumerate(rows)]
            fed = until
        return np.asarray(result, dtype=np.float32)

    def greedy(self, prompt: Sequence[int], response: IntArray) -> list[int]:
        """The most likely token at each place of a response, under the newest version."""
        self._use(self.version)
        with torch.no_grad():
            logits = self.policy.model(torch.tensor([[*prompt, *response.tolist()]])).logits[0]
        return logits[len(prompt) - 1 : -1].argmax(-1).tolist()

    def _use(self, version: int) -> None:
        for name, tensor in self.policy.named_tensors():
            tensor.copy_(self._snapshots[version][name])

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.policy.named_tensors()}


@dataclass
class Served:
    """An engine on the newest version of a learner, which reaches it in the given layout."""

    engine: Any
    learner: LearnerSide
    layout: Callable[[WeightManifest, Bytes], Published]

    @property
    def receiver(self) -> Any:
        """vLLM's weight-transfer engine: ours."""
        return self.engine._engine.model_executor.driver_worker.worker.weight_transfer_engine

    @property
    def points(self) -> bool:
        """Whether the engine's parameters are views of the published bytes."""
        return hasattr(self.receiver, "_served")

    def update(self, part: str = "", scale: float = 0.05) -> None:
        """The learner makes a version, the engine takes it."""
        self.learner.change(part, scale)
        self.engine.apply(*self.layout(*self.learner.published()))

    def sample(self, *, samples: int = 4, temperature: float = 1.0, tokens: int = 24) -> Responses:
        """Responses to PROMPTS under whatever the engine serves."""
        for i, prompt in enumerate(PROMPTS):
            self.engine.add(str(i), prompt, samples, Sampling(max_new_tokens=tokens, temperature=temperature))
        finished = {PROMPTS[int(key)]: responses for key, responses in self.run()}
        assert set(finished) == set(PROMPTS)
        return finished

    def run(self) -> Iterable[tuple[str, list[Sampled]]]:
        """Groups as they finish, until the engine has nothing to do."""
        while self.engine.busy:
            yield from self.engine.step()

    def gap(self, sampled: Responses, *, age: int = 0, temperature: float = 1.0) -> float:
        """Largest |log μ - log π| over all tokens, π being `age` versions older than the newest."""
        return max(
            float(np.abs(r.logprobs - self.learner.logprobs(prompt, r.response_ids, version, temperature)).max())
            for version in [self.learner.version - age]
            for prompt, responses in sampled.items()
            for r in responses
        )


class Engines:
    """Starts engines on a model directory, one for each way of serving, and keeps them.

    Several live in one process, but the first that is shut down (or collected) ends vLLM's process groups for all.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: dict[str, Served] = {}

    def __call__(
        self,
        layout: Callable[[WeightManifest, Bytes], Published] | None = None,
        publish: str = "float32",
        **rollout: Any,
    ) -> Served:
        """The engine with these options, wherever earlier tests left it."""
        from rlsys.engines.vllm_engine import VllmEngine

        key = repr((layout, publish, sorted(rollout.items())))
        if key not in self._started:
            gc.freeze()  # vLLM collects garbage seven times a start, over everything that was ever imported
            path, model = str(self._directory), ModelConfig(path=str(self._directory), max_context=CONTEXT)
            options = RolloutConfig(max_new_tokens=64, **{"kv_cache_gib": 1 / 128, **rollout})
            engine = VllmEngine(path, model, options, seed=0)
            self._started[key] = Served(engine, LearnerSide(self._directory, publish), layout or as_it_is)
        return self._started[key]


def read_only(buffer: Bytes) -> Bytes:
    """A copy that is like Ray's shared memory: not to be written."""
    copy = buffer.copy()
    copy.flags.writeable = False
    return copy


def as_it_is(manifest: WeightManifest, buffer: Bytes) -> Published:
    """The layout of `rlsys.weights`, which an engine on a CPU can point at."""
    return manifest, buffer


def scattered(manifest: WeightManifest, buffer: Bytes) -> Published:
    """The same version laid out as another learner might: no two tensors side by side."""
    slots: list[TensorSlot] = []
    offset = 0
    for slot in reversed(manifest.layout):
        slots.append(replace(slot, offset=offset))
        offset += -(-slot.nbytes // 64) * 64 + 64
    moved = np.zeros(offset, dtype=np.uint8)
    for slot, original in zip(slots, reversed(manifest.layout), strict=True):
        moved[slot.offset : slot.offset + slot.nbytes] = buffer[original.offset : original.offset + original.nbytes]
    return replace(manifest, layout=tuple(slots), nbytes=offset, checksum=checksum(moved)), read_only(moved)
