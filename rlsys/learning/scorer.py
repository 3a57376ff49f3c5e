"""Log-probabilities under a frozen policy: the reference of the KL term."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rlsys.config.schema import Dtype
from rlsys.learning.packing import Sequences, pack
from rlsys.learning.policy import load_policy
from rlsys.records import FloatArray, RolloutGroup


class Scorer:
    """Scores responses under the policy in `path`, with the sampling temperature. Immutable and stateless."""

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: Dtype,
        temperature: float,
        row_tokens: int = 64,
        micro_batch_tokens: int = 8192,
        device: str = "cpu",
    ) -> None:
        """Row and micro-batch sizes as in `LearnerConfig`; they change no result."""
        self._policy = load_policy(path, dtype, device=device)
        self._policy.model.requires_grad_(False)
        self._temperature, self._row_tokens, self._micro_batch_tokens = temperature, row_tokens, micro_batch_tokens

    @torch.no_grad()
    def score(self, groups: Sequence[RolloutGroup]) -> list[FloatArray]:
        """log π_ref(y_t | s_t), one [T] array per response: groups in order, rollouts in order. Nats."""
        sequences = Sequences(
            prompts=[group.prompt.token_ids for group in groups],
            responses=[rollout.response_ids for group in groups for rollout in group.rollouts],
            prompt_of=[i for i, group in enumerate(groups) for _ in group.rollouts],
        )
        offsets = sequences.offsets()
        packing = pack(sequences, row_tokens=self._row_tokens, micro_batch_tokens=self._micro_batch_tokens)
        flat = np.zeros(offsets[-1], dtype=np.float32)
        for micro in packing.micro_batches:
            output = self._policy.token_logprobs(micro, self._temperature)
            flat[micro.token_index.numpy()] = output.logprobs.cpu().numpy()
        return np.split(flat, offsets[1:-1]) if len(sequences.responses) else []
