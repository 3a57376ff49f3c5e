"""How data becomes old: a learner that really takes steps, and the policies it passes through."""

import torch
from torch import Tensor

from rlsys.algo.advantages import compute_advantages
from rlsys.algo.batch import BatchTotals, TokenBatch
from rlsys.algo.objectives import policy_loss
from rlsys.lab.exact import reward_gradient
from rlsys.lab.tree import Tree, random_policy, sample


class Adam:
    """Adam (Kingma and Ba 2014) on one table of logits, at its usual constants.

    Written out because the first step of any `torch.optim` imports a compiler, for longer than a study takes.
    """

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        self._steps = 0
        self._first: Tensor | float = 0.0
        self._second: Tensor | float = 0.0

    def descend(self, parameters: Tensor, slope: Tensor) -> Tensor:
        """New parameters, one step down the slope."""
        self._steps += 1
        self._first = 0.9 * self._first + 0.1 * slope
        self._second = 0.999 * self._second + 0.001 * slope.square()
        mean, square = self._first / (1 - 0.9**self._steps), self._second / (1 - 0.999**self._steps)
        return parameters - self._learning_rate * mean / (square.sqrt() + 1e-8)


def learner_steps(
    tree: Tree,
    policy: Tensor,
    rewards: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    responses: int = 64,
    learning_rate: float = 0.05,
) -> list[Tensor]:
    """The policies of a learner before and after each of `steps` updates, the oldest first; steps + 1 of them.

    Every update samples `responses` from the policy it is about to change, gives them `rloo` advantages, and lets
    Adam follow the gradient of the real on-policy loss. A batch of version v − k is k of these steps old.
    """
    passed = [policy.detach()]
    optimizer = Adam(learning_rate)
    for _ in range(steps):
        parameters = passed[-1].clone().requires_grad_()
        drawn = sample(tree, passed[-1], responses, generator)
        advantages = compute_advantages("rloo", rewards[drawn], torch.zeros_like(drawn)).advantages
        positions, index = tree.tokens_of(drawn)
        logprobs = tree.logprobs(parameters, positions)
        batch = TokenBatch(
            policy_logprobs=logprobs,
            behavior_logprobs=logprobs.detach(),
            step_start_logprobs=logprobs.detach(),
            advantages=advantages[index],
            loss_mask=torch.ones_like(index, dtype=torch.bool),
            response_index=index,
            responses=responses,
        )
        totals = BatchTotals(tokens=len(index), responses=responses, max_tokens=tree.horizon)
        loss = policy_loss(batch, totals, objective="reinforce", reduce="constant").loss
        (slope,) = torch.autograd.grad(loss, parameters)
        passed.append(optimizer.descend(passed[-1], slope))
    return passed


def aimless_steps(tree: Tree, policy: Tensor, steps: int, generator: torch.Generator, step: float) -> list[Tensor]:
    """The policies before and after each of `steps` equal moves in a random direction, normal per logit.

    Drift that has nothing to do with the reward, such as noise or a mismatch between engine and learner.
    """
    direction = random_policy(tree, generator, step)
    return [policy.detach() + number * direction for number in range(steps + 1)]


def exact_ascent(tree: Tree, policy: Tensor, rewards: Tensor, steps: int, learning_rate: float) -> list[Tensor]:
    """The policies before and after each of `steps` plain steps along ∇J itself, the oldest first."""
    passed = [policy.detach()]
    for _ in range(steps):
        passed.append(passed[-1] + learning_rate * reward_gradient(tree, passed[-1], rewards))
    return passed
