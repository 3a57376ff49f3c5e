"""The primitives of an importance weight, always formed from a difference of logs.

Two views of a response with r_t = π(y_t|s_t)/μ(y_t|s_t): the bandit's one weight w(y) = Π_t r_t, and the
token view's one weight per token. Both are exp of a *raw* log (a sum, a mean, or one token's) clamped
once, to ±20; the gradient beyond the clamp is zero.
"""

import torch
from torch import Tensor

LOG_RATIO_CLAMP = 20.0
"""Nats; e^20 ≈ 4.9e8 keeps float32 products finite while never acting on a healthy run."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp(clamp(x, ±20)), elementwise; zero gradient where the clamp acts."""
    return log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()


def beyond_clamp(log_ratio: Tensor) -> Tensor:
    """Where `bounded_exp` clamps: |x| > 20, elementwise, bool."""
    return log_ratio.abs() > LOG_RATIO_CLAMP


def segment_sum(values: Tensor, index: Tensor, segments: int) -> Tensor:
    """Σ over the elements of each segment. values: [N], index: [N] int64. Returns [segments]."""
    return torch.zeros(segments, dtype=values.dtype, device=values.device).index_add(0, index, values)


def response_lengths(loss_mask: Tensor, response_index: Tensor, responses: int) -> Tensor:
    """|y_i| = number of trained tokens of each response. Shapes: [N] bool, [N] int64 -> [G] int64."""
    return segment_sum(loss_mask.long(), response_index, responses)


def log_ratio(numerator: Tensor, denominator: Tensor, loss_mask: Tensor) -> Tensor:
    """log numerator − log denominator on trained tokens, 0 elsewhere whatever is stored there. All [N]."""
    return numerator.masked_fill(~loss_mask, 0.0) - denominator.masked_fill(~loss_mask, 0.0)


def sequence_log_ratio(token_log_ratio: Tensor, response_index: Tensor, responses: int) -> Tensor:
    """log w(y_i) = Σ_t log r_t, raw. token_log_ratio: [N], 0 on untrained tokens. Returns [G]."""
    return segment_sum(token_log_ratio, response_index, responses)
