"""Numbers about importance weights: raw (before any clamp or clip), in log space, float64, by staleness.

One aggregate can look healthy while a run collapses: tails, the sequence level and every staleness bucket
are reported beside it. Keys are those of the metric catalogue; an empty bucket is None, not 0. What exceeds
a float saturates at the largest one, so that every number stays valid JSON.
"""

import math
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from rlsys.algo.staleness import STALENESS_BUCKETS, response_staleness, staleness_bucket

Metrics = dict[str, float | None]


def weight_diagnostics(
    log_ratio: Tensor,
    loss_mask: Tensor,
    response_index: Tensor,
    responses: int,
    staleness: Tensor | None = None,
    *,
    cap: float | None = None,
    prefix: str = "importance",
) -> Metrics:
    """ESS, χ², KL and tails of w = exp(log_ratio), per token and per sequence, overall and by staleness.

    log_ratio: [N] raw log π_θ − log μ (or log π_V − log μ). staleness: [N] int64 or None (no buckets then).
    cap: also the ESS of min(w, cap), as `ess_token_truncated` and `ess_sequence_truncated`. Keys:
    `{prefix}/{name}` and `{prefix}/{name}/by_staleness/{0,1,2,3,4+}`. Names, with n tokens or sequences:

    ess_token, ess_sequence            (Σw)²/(n Σw²), in (0, 1]; ≈ 1/(1 + 2·k3) for small ratios
    chi2_token, chi2_sequence          mean(w²) − 1
    mean_weight_token, …_sequence      mean(w); 1 in expectation under μ
    k1, k3                             mean(−log r), mean(r − log r − 1), per token, nats
    log_ratio_p01, _p50, _p99, _abs_max
    linearization_gap                  mean over responses of |Π r − 1 − Σ(r − 1)|

    A response's bucket is that of its oldest trained token.
    """
    mask, index = loss_mask.cpu(), response_index.cpu()
    token = log_ratio.detach().cpu().double()[mask]
    index = index[mask]
    summed = torch.zeros(responses, dtype=torch.float64).index_add(0, index, token)
    linear = torch.zeros(responses, dtype=torch.float64).index_add(0, index, token.expm1())
    present = torch.bincount(index, minlength=responses) > 0

    def measure(tokens: Tensor, sequences: Tensor) -> Metrics:
        return {
            **_token_metrics(token[tokens], cap),
            **_sequence_metrics(summed[sequences], linear[sequences], cap),
        }

    metrics = {f"{prefix}/{name}": v for name, v in measure(torch.ones_like(index, dtype=torch.bool), present).items()}
    if staleness is not None:
        token_bucket = staleness_bucket(staleness.cpu()[mask])
        oldest = response_staleness(staleness.cpu(), mask, response_index.cpu(), responses)
        for bucket, label in enumerate(STALENESS_BUCKETS):
            found = measure(token_bucket == bucket, staleness_bucket(oldest) == bucket)
            metrics |= {f"{prefix}/{name}/by_staleness/{label}": v for name, v in found.items()}
    return metrics


def flag_fractions(
    flags: Mapping[str, Tensor],
    *,
    advantages: Tensor,
    loss_mask: Tensor,
    staleness: Tensor | None = None,
    prefix: str = "importance",
) -> Metrics:
    """Share of trained tokens with each flag: overall, by sign of A, and by staleness.

    flags: name -> [N] bool, such as {"clip_fraction": out.clipped, "outside_fraction": out.outside,
    "masked_fraction": ~correction.keep}. Keys `{prefix}/{name}`, `…/by_sign/{positive,negative}`,
    `…/by_staleness/{0,1,2,3,4+}`. A = 0 belongs to neither sign.
    """
    subsets = {
        "": loss_mask,
        "/by_sign/positive": loss_mask & (advantages > 0),
        "/by_sign/negative": loss_mask & (advantages < 0),
    }
    if staleness is not None:
        bucket = staleness_bucket(staleness)
        for number, label in enumerate(STALENESS_BUCKETS):
            subsets[f"/by_staleness/{label}"] = loss_mask & (bucket == number)
    return {
        f"{prefix}/{name}{where}": _mean(flag[subset].double())
        for name, flag in flags.items()
        for where, subset in subsets.items()
    }


def effective_sample_size(log_weights: Tensor) -> float | None:
    """ESS/n = (Σw)²/(n Σw²) from raw log-weights [n], in (0, 1]; None when empty."""
    if not len(log_weights):
        return None
    return _float((2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp() / len(log_weights))


def _token_metrics(x: Tensor, cap: float | None) -> Metrics:
    p01, p50, p99 = _quantiles(x)
    return {
        **_moments(x, "token", cap),
        "k1": _mean(-x),
        "k3": _mean(x.expm1() - x),
        "log_ratio_p01": p01,
        "log_ratio_p50": p50,
        "log_ratio_p99": p99,
        "log_ratio_abs_max": _float(x.abs().max()) if len(x) else None,
    }


def _sequence_metrics(log_weight: Tensor, linear: Tensor, cap: float | None) -> Metrics:
    return {
        **_moments(log_weight, "sequence", cap),
        "linearization_gap": _mean((log_weight.expm1() - linear).abs()),
    }


def _moments(log_weight: Tensor, level: str, cap: float | None) -> Metrics:
    metrics: Metrics = {
        f"ess_{level}": effective_sample_size(log_weight),
        f"chi2_{level}": _mean((2 * log_weight).expm1()),
        f"mean_weight_{level}": _mean(log_weight.exp()),
    }
    if cap is not None:
        metrics[f"ess_{level}_truncated"] = effective_sample_size(log_weight.clamp(max=math.log(cap)))
    return metrics


def _quantiles(x: Tensor) -> tuple[float | None, float | None, float | None]:
    """p1, p50, p99, linearly interpolated, from one sort (torch.quantile refuses more than 2^24 values)."""
    if not len(x):
        return None, None, None
    ordered = x.sort().values

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        return _float(torch.lerp(ordered[low], ordered[math.ceil(place)], place - low))

    return at(0.01), at(0.5), at(0.99)


def _mean(values: Tensor) -> float | None:
    return _float(values.mean()) if len(values) else None


def _float(value: Tensor) -> float:
    """A Python float; +inf, and the NaN of inf − inf, become the largest one."""
    number = float(value)
    return number if math.isfinite(number) else sys.float_info.max
