"""Claim 17: errors that compound on fixed demonstrations, and do not when the policy practises on its own mistakes.

The language is counting, 0 1 2 0 1 2 …; the symbols 3, 4, 5 are slips, after which the only right token is 0. The
policy sees the previous token: a table of 6 × 6 logits. The start counts poorly and, like a language model that has
lost its thread, repeats a slip. Error is the expected number of wrong tokens in T, exact by following the chain.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlsys.algo.advantages import step_advantages
from rlsys.algo.batch import BatchTotals, TokenBatch
from rlsys.algo.objectives import policy_loss
from rlsys.lab import plots
from rlsys.lab.claims.outcome import Outcome, at_least, at_most, equal
from rlsys.lab.estimate import Estimate, geometric_mean, mean
from rlsys.lab.staleness import Adam
from rlsys.lab.tree import seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SYMBOLS = 6
RIGHT = torch.tensor([1, 2, 0, 0, 0, 0])
"""The right token after each symbol."""
SLIP = 3
"""Symbols from here on are mistakes that a demonstration never shows."""
BEFORE_FIRST = 2
"""What a response starts from: its first right token is 0."""
RESPONSES = 64
UPDATES = 150


class Data(NamedTuple):
    """Training tokens, [learners, responses, T]: what was seen, what should follow it, and the advantage of that."""

    seen: Tensor
    tokens: Tensor
    advantages: Tensor


class Trained(NamedTuple):
    """Of each learner, [learners]."""

    error: list[float]
    """Expected wrong tokens in a response."""
    slips_seen: list[float]
    """Share of training tokens that followed a slip."""
    recovers: list[float]
    """Probability of the right token after a slip, mean over slips."""
    learnt: list[float]
    """How much of that is new since the start."""


Source = Callable[[Tensor, int, torch.Generator], Data]
"""(policies [learners, 6, 6], T, generator) -> the data of an update."""


def compounding_errors(tasks: int) -> Outcome:
    """A model trained on fixed demonstrations compounds its errors with T; on-policy training does not.

    Demonstrations hold no slips, so whatever the policy does after one stays as it was: each of the εT first slips
    costs what is left of the response, εT²/2 in all while few responses slip (Ross and Bagnell 2010). On-policy data
    holds the policy's own slips as long as it makes them, recovery is learnt, and the error is about εT. Same start,
    same number of updates and tokens, a real loss each: `raft` on demonstrations, `ppo_clip` with step rewards. That it
    is the data and not the loss is shown by a third: imitation of the right token at the policy's *own* prefixes.
    Falsified by an exponent of demonstrations near 1, one of on-policy training well above 1, or slips in both data.
    """
    lengths = (4, 8, 16, 32, 64)
    start = torch.stack([_start(seed) for seed in range(tasks)])
    found = {name: {t: _train(source, start, t) for t in lengths} for name, source in SOURCES.items()}
    exponents = {name: _exponents(lengths, by_length) for name, by_length in found.items()}
    fixed, practised = (found[name][lengths[-1]] for name in ("demonstrations", "on-policy RL"))

    return Outcome(
        checks=(
            at_least("demonstrations: exponent of the error in T", 1.25, exponents["demonstrations"]),
            at_most("on-policy RL: exponent of the error in T", 1.25, exponents["on-policy RL"]),
            at_most("on-policy imitation: exponent of the error in T", 1.25, exponents["on-policy imitation"]),
            at_least(
                f"error at T = {lengths[-1]}: demonstrations over on-policy RL",
                3.0,
                geometric_mean([a / b for a, b in zip(fixed.error, practised.error, strict=True)]),
            ),
            equal("demonstrations: share of training tokens after a slip", 0.0, fixed.slips_seen, 0.0),
            equal("demonstrations: learnt about recovering from a slip", 0.0, fixed.learnt, 0.0),
            at_least("on-policy RL: share of training tokens after a slip", 0.005, mean(practised.slips_seen)),
            at_least("on-policy RL: learnt about recovering from a slip", 0.05, mean(practised.learnt)),
        ),
        draw=lambda figure: _draw(figure, lengths, start, found, exponents),
        notes=tuple(
            f"{name}: {mean(by_length[lengths[-1]].error).value:.2f} wrong tokens of {lengths[-1]}"
            for name, by_length in found.items()
        ),
    )


def demonstrations(policies: Tensor, length: int, generator: torch.Generator) -> Data:
    """The expert counting without a slip, always the same."""
    tokens = (torch.arange(length) % 3).expand(len(policies), RESPONSES, length)
    seen = torch.cat([torch.full_like(tokens[..., :1], BEFORE_FIRST), tokens[..., :-1]], -1)
    return Data(seen, tokens, torch.ones(tokens.shape, dtype=torch.float64))


def practice(policies: Tensor, length: int, generator: torch.Generator) -> Data:
    """The policy's own responses; a right token earns 1; rewards to go, less their mean over the learner's batch."""
    seen, tokens = _speak(policies, length, generator)
    rewards = (tokens == RIGHT[seen]).double()
    index = torch.arange(rewards[..., 0].numel()).repeat_interleave(length)
    everything = torch.ones_like(index, dtype=torch.bool)
    to_go = step_advantages(rewards.flatten(), everything, index, rewards[..., 0].numel()).view(rewards.shape)
    return Data(seen, tokens, to_go - to_go.mean(1, keepdim=True))


def corrected_practice(policies: Tensor, length: int, generator: torch.Generator) -> Data:
    """The policy's own prefixes, with the token that would have been right (DAgger, Ross 2011)."""
    seen, _ = _speak(policies, length, generator)
    return Data(seen, RIGHT[seen], torch.ones(seen.shape, dtype=torch.float64))


SOURCES: dict[str, Source] = {
    "demonstrations": demonstrations,
    "on-policy RL": practice,
    "on-policy imitation": corrected_practice,
}


def _speak(policies: Tensor, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Responses of every learner: the previous token of each position, and the token, [learners, responses, T]."""
    learners = torch.arange(len(policies))[:, None]
    chances = policies.softmax(-1)
    said = [torch.full((len(policies), RESPONSES), BEFORE_FIRST)]
    for _ in range(length):
        following = torch.multinomial(chances[learners, said[-1]].flatten(0, 1), 1, generator=generator)
        said.append(following.view(len(policies), RESPONSES))
    return torch.stack(said[:-1], -1), torch.stack(said[1:], -1)


def _start(seed: int) -> Tensor:
    """Right with probability about 0.6 while counting; after a slip, repeats it with about 0.96."""
    generator = seeded(17, seed)
    logits = 0.3 * torch.randn(SYMBOLS, SYMBOLS, generator=generator, dtype=torch.float64)
    logits[torch.arange(SLIP), RIGHT[:SLIP]] += 2.0
    logits[torch.arange(SLIP, SYMBOLS), torch.arange(SLIP, SYMBOLS)] += 5.0
    return logits


def _train(source: Source, start: Tensor, length: int) -> Trained:
    """Independent learners side by side: Adam works on each logit alone, and each loss on its own responses."""
    policies, generator, optimizer = start, seeded(17, length), Adam(learning_rate=0.05)
    objective = "ppo_clip" if source is practice else "raft"
    slips = torch.zeros(len(start), dtype=torch.float64)
    for _ in range(UPDATES):
        data = source(policies, length, generator)
        policies = optimizer.descend(policies, _slope(policies, data, objective))
        slips += (data.seen >= SLIP).double().mean((1, 2)) / UPDATES
    right, before = (_right(p)[:, SLIP:].mean(1) for p in (policies, start))
    return Trained(
        error=[_error(policy, length) for policy in policies],
        slips_seen=slips.tolist(),
        recovers=right.tolist(),
        learnt=(right - before).tolist(),
    )


def _slope(policies: Tensor, data: Data, objective: str) -> Tensor:
    """Gradient of the sum of the learners' losses, each the real loss of its own data."""
    parameters = policies.clone().requires_grad_()
    learners, responses, length = data.tokens.shape
    learner = torch.arange(learners)[:, None, None]
    logprobs = parameters.log_softmax(-1)[learner, data.seen, data.tokens].flatten()
    batch = TokenBatch(
        policy_logprobs=logprobs,
        behavior_logprobs=logprobs.detach(),
        step_start_logprobs=logprobs.detach(),
        advantages=data.advantages.flatten(),
        loss_mask=torch.ones_like(logprobs, dtype=torch.bool),
        response_index=torch.arange(learners * responses).repeat_interleave(length),
        responses=learners * responses,
    )
    one_learner = BatchTotals(tokens=responses * length, responses=responses, max_tokens=length)
    loss = policy_loss(batch, one_learner, objective=objective, reduce="constant").loss
    return torch.autograd.grad(loss, parameters)[0]


def _right(policies: Tensor) -> Tensor:
    """P(right token | symbol), [..., symbols]."""
    return policies.softmax(-1)[..., torch.arange(SYMBOLS), RIGHT]


def _error(policy: Tensor, length: int) -> float:
    """Σ_t P(token t is wrong given its predecessor), by following the distribution of the previous token."""
    chances, wrong = policy.softmax(-1), 1 - _right(policy)
    visits = torch.zeros(SYMBOLS, dtype=torch.float64)
    visits[BEFORE_FIRST] = 1.0
    total = 0.0
    for _ in range(length):
        total += float(visits @ wrong)
        visits = visits @ chances
    return total


def _exponents(lengths: tuple[int, ...], by_length: dict[int, Trained]) -> Estimate:
    """Least-squares slope of log error against log T, over learners."""
    x = torch.tensor(lengths, dtype=torch.float64).log()
    y = torch.tensor([by_length[t].error for t in lengths], dtype=torch.float64).log()
    centred = x - x.mean()
    return mean((centred @ y / centred.square().sum()).tolist())


def _draw(
    figure: "Figure",
    lengths: tuple[int, ...],
    start: Tensor,
    found: dict[str, dict[int, Trained]],
    exponents: dict[str, Estimate],
) -> None:
    left, right = plots.panels(figure, 2)
    common = [mean([_error(policy, t) for policy in start]).value for t in lengths]
    left.loglog(lengths, common, ":", color=plots.GREY, label="the common start")
    for (name, by_length), color in zip(found.items(), (plots.RED, plots.BLUE, plots.GREEN), strict=True):
        label = f"{name}: T^{exponents[name].value:.2f}"
        plots.with_intervals(left, lengths, [mean(by_length[t].error) for t in lengths], color=color, label=label)
        plots.with_intervals(right, lengths, [mean(by_length[t].recovers) for t in lengths], color=color, label=name)
    left.set(title="Errors against length", xlabel="length T", ylabel="expected wrong tokens")
    right.set(title="What was learnt about slips", xlabel="length T", ylabel="P(right token | after a slip)")
    right.set(xscale="log", ylim=(0, 1.02))
    for axes in (left, right):
        axes.set_xticks(lengths, [str(t) for t in lengths])
        axes.minorticks_off()
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
