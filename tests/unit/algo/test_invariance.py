"""What must never matter: order, padding, micro-batches, untrained tokens; and what must stay constant."""

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlsys.algo.batch import REDUCTIONS, BatchTotals, LossOutput, TokenBatch
from rlsys.algo.corrections import SEQUENCE_OBJECTIVES, compute_correction
from rlsys.algo.divergence import kl_loss
from rlsys.algo.objectives import OBJECTIVES, policy_loss

PAIRS = [
    (objective, correction)
    for objective in sorted(OBJECTIVES)
    for correction in ("none", "tis", "mask_token", "mask_sequence", "m2")
    if not (objective in SEQUENCE_OBJECTIVES and correction in ("mask_token", "m2"))
]
LOSSES = st.sampled_from([*PAIRS, ("kl", "k2"), ("kl", "k3")])
REDUCE = st.sampled_from(sorted(REDUCTIONS))
LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=5)
SEED = st.integers(0, 10_000)
fast = settings(max_examples=60, deadline=None)


def random_batch(lengths: list[int], seed: int, *, spread: float = 0.5) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    tokens, responses = sum(lengths), len(lengths)
    index = torch.repeat_interleave(torch.arange(responses), torch.tensor(lengths))
    policy = -normal(tokens).abs() - 0.1
    return TokenBatch(
        policy_logprobs=policy.clone().requires_grad_(),
        behavior_logprobs=policy + spread * normal(tokens),
        step_start_logprobs=policy + spread / 2 * normal(tokens),
        proximal_logprobs=policy + spread / 3 * normal(tokens),
        reference_logprobs=policy + spread * normal(tokens),
        advantages=normal(responses)[index],
        loss_mask=torch.rand(tokens, generator=generator) < 0.8,
        response_index=index,
        responses=responses,
    )


def totals_of(tokens: TokenBatch) -> BatchTotals:
    lengths = tokens.lengths()
    return BatchTotals(tokens=int(lengths.sum()), responses=int((lengths > 0).sum()), max_tokens=5)


def evaluate(
    tokens: TokenBatch, loss: tuple[str, str], reduce: str, *, splits: list[Tensor] | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient and metrics of a batch, summed over micro-batches of whole responses (`splits`)."""
    name, variant = loss
    totals = totals_of(tokens)
    correction = None
    if name != "kl":
        correction = compute_correction(
            variant,
            step_start_logprobs=tokens.step_start_logprobs,
            behavior_logprobs=tokens.behavior_logprobs,
            proximal_logprobs=tokens.proximal_logprobs,
            loss_mask=tokens.loss_mask,
            response_index=tokens.response_index,
            responses=tokens.responses,
            objective=name,
        )
    outputs: list[LossOutput] = []
    for positions in splits or [torch.arange(len(tokens.loss_mask))]:
        part = select(tokens, positions)
        if correction is None:
            outputs.append(kl_loss(part, totals, estimator=variant, reduce=reduce, coef=0.1))
        else:
            taken = correction.take(positions)
            outputs.append(policy_loss(part, totals, objective=name, reduce=reduce, correction=taken))
    value = torch.stack([out.loss for out in outputs]).sum()
    (gradient,) = torch.autograd.grad(value, tokens.policy_logprobs)
    metrics = {key: torch.stack([out.metrics[key] for out in outputs]).sum() for key in outputs[0].metrics}
    return value.detach(), gradient, metrics


def select(tokens: TokenBatch, positions: Tensor) -> TokenBatch:
    part = each_tensor(tokens, lambda values: values[positions])
    labels, index = torch.unique(tokens.response_index[positions], return_inverse=True)
    return replace(part, response_index=index, responses=len(labels))


def each_tensor(tokens: TokenBatch, change: Callable[[Tensor], Tensor]) -> TokenBatch:
    values = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    changed: dict[str, Any] = {k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()}
    return TokenBatch(**changed)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-10, atol=1e-12)


@fast
@given(LENGTHS, SEED, LOSSES, REDUCE, st.randoms(use_true_random=False))
def test_the_order_of_responses_changes_nothing(lengths, seed, loss, reduce, random) -> None:
    tokens = random_batch(lengths, seed)
    order = random.sample(range(len(lengths)), len(lengths))
    positions = torch.cat([(tokens.response_index == i).nonzero().squeeze(-1) for i in order])
    shuffled = select(tokens, positions)
    shuffled = replace(shuffled, policy_logprobs=shuffled.policy_logprobs.detach().requires_grad_())
    value, gradient, metrics = evaluate(tokens, loss, reduce)
    other_value, other_gradient, other_metrics = evaluate(shuffled, loss, reduce)
    torch.testing.assert_close(value, other_value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient[positions], other_gradient, rtol=1e-10, atol=1e-12)
    assert_same(metrics, other_metrics)


@fast
@given(LENGTHS, SEED, LOSSES, REDUCE, st.sets(st.integers(1, 4)))
def test_micro_batches_and_ranks_add_up_to_the_whole(lengths, seed, loss, reduce, cuts) -> None:
    tokens = random_batch(lengths, seed)
    edges = [0, *sorted(cut for cut in cuts if cut < len(lengths)), len(lengths)]
    splits = [
        ((tokens.response_index >= a) & (tokens.response_index < b)).nonzero().squeeze(-1) for a, b in pairwise(edges)
    ]
    whole, pieces = evaluate(tokens, loss, reduce), evaluate(tokens, loss, reduce, splits=splits)
    torch.testing.assert_close(whole[0], pieces[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole[1], pieces[1], rtol=1e-10, atol=1e-12)
    assert_same(whole[2], pieces[2])


@fast
@given(LENGTHS, SEED, LOSSES, REDUCE, st.sampled_from([0.0, 1e30, float("nan"), float("-inf")]))
def test_what_stands_on_untrained_tokens_reaches_neither_loss_nor_gradient(lengths, seed, loss, reduce, junk) -> None:
    tokens = random_batch(lengths, seed)
    untrained = ~tokens.loss_mask
    dirty = each_tensor(tokens, lambda v: v.detach().masked_fill(untrained, junk) if v.is_floating_point() else v)
    dirty.policy_logprobs.requires_grad_()
    value, gradient, metrics = evaluate(tokens, loss, reduce)
    dirty_value, dirty_gradient, dirty_metrics = evaluate(dirty, loss, reduce)
    assert torch.equal(value, dirty_value)
    assert torch.equal(gradient, dirty_gradient)
    assert (dirty_gradient[untrained] == 0).all()
    assert_same(metrics, dirty_metrics)


@fast
@given(LENGTHS, SEED, LOSSES, REDUCE)
def test_padding_a_response_with_untrained_tokens_changes_nothing(lengths, seed, loss, reduce) -> None:
    tokens = random_batch(lengths, seed)
    rows = len(tokens.loss_mask)
    padded = select(tokens, torch.arange(rows).repeat_interleave(2))
    padded = replace(
        padded,
        loss_mask=padded.loss_mask & (torch.arange(2 * rows) % 2 == 0),
        policy_logprobs=padded.policy_logprobs.detach().requires_grad_(),
    )
    value, gradient, metrics = evaluate(tokens, loss, reduce)
    padded_value, padded_gradient, padded_metrics = evaluate(padded, loss, reduce)
    torch.testing.assert_close(value, padded_value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, padded_gradient[::2], rtol=1e-10, atol=1e-12)
    assert_same(metrics, padded_metrics)


@fast
@given(LENGTHS, SEED, st.sampled_from(PAIRS), REDUCE)
def test_ratio_one_gives_the_on_policy_gradient_under_every_correction(lengths, seed, loss, reduce) -> None:
    tokens = random_batch(lengths, seed, spread=0.0)
    if loss[0] == "raft":
        tokens = replace(tokens, advantages=tokens.advantages.abs())
    torch.testing.assert_close(
        evaluate(tokens, loss, reduce)[1],
        evaluate(tokens, ("reinforce", "none"), reduce)[1],
        rtol=1e-10,
        atol=1e-12,
    )


@fast
@given(LENGTHS, SEED, LOSSES, REDUCE, st.sampled_from([30.0, 1e4]))
def test_extreme_log_ratios_stay_finite_in_float32(lengths, seed, loss, reduce, spread) -> None:
    wild = random_batch(lengths, seed, spread=spread)
    tokens = each_tensor(wild, lambda v: v.detach().float() if v.is_floating_point() else v)
    tokens.policy_logprobs.requires_grad_()
    value, gradient, metrics = evaluate(tokens, loss, reduce)
    assert value.dtype == torch.float32
    assert all(found.isfinite().all() for found in (value, gradient, *metrics.values()))


@pytest.mark.parametrize("loss", [*PAIRS, ("kl", "k2"), ("kl", "k3")])
def test_no_gradient_flows_through_anything_but_the_policy(loss: tuple[str, str]) -> None:
    tokens = random_batch([3, 4, 2], seed=5)
    leaves = {
        name: getattr(tokens, name).detach().requires_grad_()
        for name in (
            "behavior_logprobs",
            "step_start_logprobs",
            "proximal_logprobs",
            "reference_logprobs",
            "advantages",
        )
    }
    tokens = replace(tokens, **leaves)
    name, variant = loss
    if name == "kl":
        out = kl_loss(tokens, totals_of(tokens), estimator=variant, reduce="constant", coef=0.1)
    else:
        correction = compute_correction(
            variant,
            step_start_logprobs=tokens.step_start_logprobs,
            behavior_logprobs=tokens.behavior_logprobs,
            proximal_logprobs=tokens.proximal_logprobs,
            loss_mask=tokens.loss_mask,
            response_index=tokens.response_index,
            responses=tokens.responses,
            objective=name,
        )
        out = policy_loss(tokens, totals_of(tokens), objective=name, reduce="constant", correction=correction)
    assert not any(metric.requires_grad for metric in out.metrics.values())
    out.loss.backward()
    assert tokens.policy_logprobs.grad is not None
    assert all(leaf.grad is None for leaf in leaves.values())


def test_a_batch_without_a_trained_token_has_loss_and_gradient_zero() -> None:
    tokens = replace(random_batch([2, 3], seed=1), loss_mask=torch.zeros(5, dtype=torch.bool))
    for loss in [*PAIRS, ("kl", "k3")]:
        value, gradient, _ = evaluate(tokens, loss, "token_mean")
        assert value == 0
        assert (gradient == 0).all()
