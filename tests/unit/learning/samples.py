"""Groups with known tokens, rewards and versions, and what a plain forward pass says about them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from rlsys.learning.learner import Learner
from rlsys.records import GroupScore, Prompt, Rollout, RolloutGroup, ScoredGroup
from rlsys.versions import VersionSpan

ALPHABET = "0123456789+="
VOCABULARY = 2 + len(ALPHABET)


def sharpen(path: Path) -> None:
    """Scale the weights so that log-probabilities depend visibly on every token attended to."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "bias" not in name:
                parameter.mul_(6.0)
    model.save_pretrained(path)


def make_rollout(
    ids: Sequence[int],
    *,
    sample: int = 0,
    behavior: npt.ArrayLike = -2.0,
    mask: Sequence[bool] | None = None,
    spans: Sequence[tuple[int, int, int]] | None = None,
) -> Rollout:
    n = len(ids)
    return Rollout(
        sample=sample,
        response_ids=np.asarray(ids, dtype=np.int32),
        behavior_logprobs=np.broadcast_to(np.asarray(behavior, dtype=np.float32), (n,)).copy(),
        loss_mask=np.ones(n, dtype=bool) if mask is None else np.asarray(mask, dtype=bool),
        version_spans=tuple(
            VersionSpan(start=a, stop=b, version=v) for a, b, v in ([(0, n, 0)] if spans is None else spans)
        ),
        finish_reason="stop",
        text="",
    )


def make_group(
    prompt: Sequence[int], rollouts: Sequence[Rollout], rewards: npt.ArrayLike, slot: int = 0
) -> ScoredGroup:
    return ScoredGroup(
        group=RolloutGroup(
            slot=slot,
            attempt=0,
            worker="rollout-0",
            prompt=Prompt(epoch=0, index=slot, text="", token_ids=tuple(prompt), answer=""),
            rollouts=tuple(rollouts),
            started_at=0.0,
            finished_at=1.0,
        ),
        score=GroupScore(slot=slot, attempt=0, rewards=np.asarray(rewards, dtype=np.float32), scored_at=1.0),
    )


def make_batch(seed: int = 0, *, groups: int = 6, samples: int = 4, version: int = 0) -> list[ScoredGroup]:
    """Random prompts of 3 to 6 tokens, responses of 1 to 5 over few symbols (so that prefixes are shared)."""
    random = np.random.default_rng(seed)
    batch = []
    for slot in range(groups):
        rollouts = []
        for sample in range(samples):
            n = int(random.integers(1, 6))
            rollouts.append(
                make_rollout(
                    [*random.integers(2, 5, n - 1), 1],
                    sample=sample,
                    behavior=random.normal(-2.0, 0.6, n),
                    spans=[(0, n, version)],
                )
            )
        prompt = random.integers(2, VOCABULARY, int(random.integers(3, 7))).tolist()
        batch.append(make_group(prompt, rollouts, random.integers(0, 2, samples).tolist(), slot))
    return batch


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    """Gradients of all parameters in one vector; every parameter must have one."""
    gradients = [parameter.grad for parameter in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def parameters(learner: Learner) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: tensor.detach().clone() for name, tensor in learner.named_tensors()}


def unpacked_logprobs(learner: Learner, prompt: Sequence[int], response: Iterable[int], temperature: float = 1.0):
    """log π of one response by a plain forward pass over that response alone, with gradient."""
    ids = torch.tensor([[*prompt, *map(int, response)]])
    logits = learner.policy.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
