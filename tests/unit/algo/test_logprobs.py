"""Log-probabilities as the engine reports them: after temperature, in float32."""

import math

import pytest
import torch

from rlsys.algo.logprobs import entropy, token_logprobs

LOGITS = torch.tensor([[0.0, 2 * math.log(3)], [math.log(4), 0.0]])


def test_temperature_is_applied_before_the_softmax() -> None:
    """At τ = 2 the first row is (1, 3)/4 and the second (2, 1)/3."""
    got = token_logprobs(LOGITS, torch.tensor([1, 0]), temperature=2.0)
    assert got.tolist() == pytest.approx([math.log(3 / 4), math.log(2 / 3)])
    by_hand = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert entropy(LOGITS, 2.0)[0].item() == pytest.approx(by_hand)


def test_the_gradient_is_one_hot_minus_probabilities_over_the_temperature() -> None:
    logits = LOGITS.clone().requires_grad_()
    token_logprobs(logits, torch.tensor([1, 0]), 2.0)[0].backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [pytest.approx([-0.125, 0.125]), [0.0, 0.0]]


def test_half_precision_logits_are_widened_before_the_sum() -> None:
    logits = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    got = token_logprobs(logits, torch.tensor([7]), 1.0)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(-math.log(50_000), rel=1e-6)
    assert entropy(logits, 1.0).item() == pytest.approx(math.log(50_000), rel=1e-5)


def test_forbidden_tokens_carry_no_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert entropy(logits, 1.0).item() == pytest.approx(math.log(2))
    assert token_logprobs(logits, torch.tensor([0]), 1.0).item() == pytest.approx(-math.log(2))


def test_shapes_and_temperature_are_asserted_at_the_door() -> None:
    with pytest.raises(ValueError, match="token_ids"):
        token_logprobs(LOGITS, torch.tensor([0]), 1.0)
    with pytest.raises(ValueError, match="logits"):
        entropy(LOGITS[0], 1.0)
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(LOGITS, torch.tensor([0, 1]), 0.0)
