"""From logits to the log-probability of a sampled token, exactly as the engine reports it."""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """log π(y_t | s_t) = z_t[y_t]/τ − log Σ_v exp(z_t[v]/τ), in float32 at least, with gradient.

    The temperature τ is applied before the softmax, as vLLM does for `logprobs_mode="processed_logprobs"`,
    so that learner and engine describe one and the same distribution.

    logits: [N, V], any float dtype. token_ids: [N] int64. Returns [N] nats. Raises ValueError on a
    shape that does not fit or a temperature that is not positive.
    """
    _check_logits(logits, temperature)
    if token_ids.shape != logits.shape[:1]:
        raise ValueError(f"token_ids: expected shape {tuple(logits.shape[:1])}, got {tuple(token_ids.shape)}")
    scaled = _scaled(logits, temperature)
    return scaled.gather(-1, token_ids[:, None]).squeeze(-1) - scaled.logsumexp(-1)


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """H(π(·|s_t)) = −Σ_v π_v log π_v after temperature; a measurement, so without gradient.

    logits: [N, V]; a token forbidden by −inf contributes 0. Returns [N] nats. Raises ValueError as above.
    """
    _check_logits(logits, temperature)
    with torch.no_grad():
        terms: Tensor = torch.special.entr(_scaled(logits, temperature).softmax(-1))
        return terms.sum(-1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature


def _check_logits(logits: Tensor, temperature: float) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits: expected [N, V], got shape {tuple(logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: must be positive, got {temperature}")
