"""Claims 7, 8 and 9: what the token view leaves behind when the policy moves: prefixes, values, its surrogate."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlsys.algo.advantages import step_advantages
from rlsys.algo.importance import segment_sum
from rlsys.lab import exact, plots
from rlsys.lab.claims.cases import Case, local_slope, random_case
from rlsys.lab.claims.outcome import Outcome, at_least, at_most, equal
from rlsys.lab.estimate import mean
from rlsys.lab.estimators import Situation, response_coefficients
from rlsys.lab.staleness import exact_ascent, learner_steps
from rlsys.lab.tree import Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = (1, 2, 4, 8, 16)


def prefix_drift(tasks: int) -> Outcome:
    """In the token view the states are prefixes, and they drift with the policy; in the bandit view they are prompts.

    Total variation of the first t tokens, TV_t = ½ Σ |d^π(s) − d^μ(s)| over prefixes of depth t (and over prompts,
    each with its own policy): 0 at t = 0, where only the prompt is known; never falling in t, because a prefix
    determines its shorter ones; and at most √(KL_t/2) with the KL of the first t tokens (Pinsker). μ and π are real
    learner steps apart. Falsified by drifting prompts, prefixes that stay, a fall, or a TV above its bound.
    """
    horizon = 6
    drifts = {k: _variations(horizon, k, groups=tasks // 3) for k in STEPS}
    every = [v for found in drifts.values() for v in found]

    def draw(figure: "Figure") -> None:
        left, right = plots.panels(figure, 2)
        for k, color in zip(STEPS, plots.SCALE, strict=True):
            average = torch.tensor([v.variation for v in drifts[k]]).mean(0)
            left.plot(range(horizon), average, "o-", color=color, label=f"{k} learner step{'s' if k > 1 else ''}")
            for v in drifts[k]:
                right.loglog(v.bound[1:], v.variation[1:], "o", color=color, markersize=3.5, markeredgewidth=0)
        low, high = right.get_xlim()
        right.plot([low, high], [low, high], color=plots.RED, linewidth=1, label="Pinsker's bound")
        left.set(
            title="States drift, prompts do not",
            xlabel="tokens in the prefix (0: the prompt)",
            ylabel="total variation",
        )
        left.set_xticks(range(horizon))
        right.set(
            title="…within what the KL allows", xlabel="√(KL of the first t tokens / 2)", ylabel="total variation"
        )
        for axes in (left, right):
            axes.legend()

    return Outcome(
        checks=(
            equal("largest total variation of prompts", 0.0, (v.variation[0] for v in every), 1e-12),
            at_least("smallest total variation of prefixes with a token", 1e-4, (v.variation[1] for v in every)),
            at_least(
                "smallest growth from one depth to the next",
                -1e-12,
                (b - a for v in every for a, b in zip(v.variation, v.variation[1:], strict=False)),
            ),
            at_most(
                "largest total variation over its bound",
                1.0,
                (a / b if b else math.inf for v in every for a, b in zip(v.variation[1:], v.bound[1:], strict=True)),
            ),
        ),
        draw=draw,
    )


class Variation(NamedTuple):
    """By depth: TV of prefixes, and √(KL/2) of the tokens so far."""

    variation: list[float]
    bound: list[float]


def _variations(horizon: int, steps: int, groups: int, prompts: int = 3) -> list[Variation]:
    """Groups of prompts, equally likely, each with its own policy and reward, before and after `steps` updates."""
    found = []
    for group in range(groups):
        variation, kl = torch.zeros(horizon, dtype=torch.float64), torch.zeros(horizon, dtype=torch.float64)
        for prompt in range(prompts):
            case = random_case(3, horizon, 7, group, prompt)
            passed = learner_steps(case.tree, case.policy, case.rewards, steps, case.generator)
            behavior, policy = passed[0], passed[-1]
            visits, old = exact.occupancy(case.tree, policy), exact.occupancy(case.tree, behavior)
            variation += segment_sum((visits - old).abs(), case.tree.depths, horizon) / 2 / prompts
            kl += segment_sum(visits * exact.token_kl(policy, behavior), case.tree.depths, horizon) / prompts
        before = kl.cumsum(0) - kl
        found.append(Variation(variation.tolist(), (before / 2).sqrt().tolist()))
    return found


def stale_values(tasks: int) -> Outcome:
    """Q^{π_old} is pessimistic at prefixes after which the policy has improved.

    Q^π(s,a) − Q^μ(s,a) = Σ_{s' below (s,a)} P_π(s'|s,a)·Ā(s'), Ā(s') = Σ_a' π(a'|s') A^μ(s',a') (the performance
    difference lemma): the sum of the gains, in old values, that the policy makes further down. So it is ≥ 0 where
    every later choice improved, ≤ 0 where every one got worse, and 0 at the last token. Steps along the exact ∇J
    improve every choice (to each row they add a positive multiple of π(a)A(a), so E_π'[A] ≥ E_π[A] = 0): Q^μ is then
    too low everywhere. Falsified by any prefix with the other sign, or a size off the sum.
    """
    cases = [random_case(3, 4, 8, seed) for seed in range(tasks)]
    climbed = {
        k: [_gaps(case, exact_ascent(case.tree, case.policy, case.rewards, k, 2.0)[-1]) for case in cases]
        for k in STEPS
    }
    learnt = [_gaps(case, learner_steps(case.tree, case.policy, case.rewards, 8, case.generator)[-1]) for case in cases]
    aimless = [_gaps(case, case.policy + 0.5 * case.direction) for case in cases]
    every = [g for found in (*climbed.values(), learnt, aimless) for g in found]
    better = torch.cat([g.gap[g.improved & ~g.last] for g in aimless])
    worse = torch.cat([g.gap[g.worsened & ~g.last] for g in aimless])
    real = [int((found.abs() > 1e-9).sum()) for found in (better, worse)]

    return Outcome(
        checks=(
            equal("largest error of the difference lemma", 0.0, (g.identity_error for g in every), 1e-12),
            at_least(
                "steps along ∇J: smallest Q − old Q, any prefix",
                -1e-12,
                (float(g.gap.min()) for found in climbed.values() for g in found),
            ),
            at_least(
                "sampled learner, 8 steps: mean Q − old Q at the first token",
                0.0,
                mean([float(g.mean_gap[0]) for g in learnt]),
            ),
            at_least("aimless drift, all later choices improved: smallest Q − old Q", -1e-12, float(better.min())),
            at_most("aimless drift, all later choices got worse: largest Q − old Q", 1e-12, float(worse.max())),
            at_least("…pairs that could tell, the fewer of both", 10, min(real)),
            equal("last token: largest |Q − old Q|", 0.0, (float(g.gap[g.last].abs().max()) for g in every), 1e-12),
        ),
        draw=lambda figure: _draw_values(figure, aimless, climbed),
        notes=(
            f"aimless drift: {real[0]} pairs (prefix, token) with only better choices after, {real[1]} with only worse",
        ),
    )


def _draw_values(figure: "Figure", aimless: list["Gaps"], climbed: dict[int, list["Gaps"]]) -> None:
    left, right = plots.panels(figure, 2)
    shown = aimless[:8]
    improved, worsened, last, gain, gap = (
        torch.cat([getattr(g, name) for g in shown]) for name in ("improved", "worsened", "last", "gain", "gap")
    )
    for mask, color, label in (
        (~improved & ~worsened, plots.GREY, "some of each"),
        (improved, plots.BLUE, "all later choices improved"),
        (worsened, plots.RED, "all later choices got worse"),
    ):
        own = mask & ~last
        left.plot(gain[own], gap[own], "o", color=color, alpha=0.6, markersize=4, markeredgewidth=0, label=label)
    left.axhline(0, color=plots.INK, linewidth=1)
    left.set(
        title="Aimless drift, every (prefix, token)",
        xlabel="gain of the very next choice, in old values",
        ylabel="Q − old Q",
    )
    for depth, color in zip(range(4), plots.SCALE[::-1], strict=False):
        sizes = [torch.stack([g.mean_gap[depth] for g in climbed[k]]).mean() for k in STEPS]
        right.plot(STEPS, sizes, "o-", color=color, label=f"at token {depth + 1} of 4")
    right.set(title="How pessimistic, on average", xlabel="steps along ∇J since the data", ylabel="Q − old Q, under π")
    for axes in (left, right):
        axes.legend()


class Gaps(NamedTuple):
    """Q^π − Q^μ of every (prefix, token), and what explains it; [prefixes · vocabulary] unless said otherwise."""

    gap: Tensor
    gain: Tensor  # Ā at the very next prefix; 0 at the last token
    improved: Tensor  # Ā ≥ 0 at every later prefix
    worsened: Tensor  # Ā ≤ 0 at every later prefix
    last: Tensor  # no prefix follows
    mean_gap: Tensor  # [horizon] E_π of the gap by position
    identity_error: float


def _gaps(case: Case, policy: Tensor) -> Gaps:
    """Of a policy that started as the case's own."""
    tree, behavior = case.tree, case.policy
    old, new = (exact.action_values(tree, p, case.rewards) for p in (behavior, policy))
    advantage = old - (behavior.softmax(-1) * old).sum(-1, keepdim=True)
    gain = (policy.softmax(-1) * advantage).sum(-1)[tree.prefix_ids]  # Ā(s_t) at every token of the tree
    everything = torch.ones_like(tree.token_ids, dtype=torch.bool)
    later = step_advantages(gain, everything, tree.response_index, tree.responses) - gain
    probability = tree.probabilities(policy)[tree.response_index]
    cells = tree.prefixes * tree.vocabulary
    explained = segment_sum(probability * later, tree.cells, cells) / segment_sum(probability, tree.cells, cells)
    gap = (new - old).flatten()
    worst, best = (_over_later(tree, gain, tree.cells, cells, kind) for kind in ("amin", "amax"))
    last = (tree.depths == tree.horizon - 1).repeat_interleave(tree.vocabulary)
    reached = exact.occupancy(tree, policy).repeat_interleave(tree.vocabulary) * policy.softmax(-1).flatten()
    following = torch.zeros(cells, dtype=torch.float64)
    following[tree.cells[:-1]] = torch.where(tree.response_index[1:] == tree.response_index[:-1], gain[1:], 0.0)
    return Gaps(
        gap=gap,
        gain=following,
        improved=worst >= 0,
        worsened=best <= 0,
        last=last,
        mean_gap=segment_sum(reached * gap, tree.depths.repeat_interleave(tree.vocabulary), tree.horizon),
        identity_error=float((gap - explained).abs().max()),
    )


def _over_later(tree: Tree, gain: Tensor, cells: Tensor, count: int, kind: str) -> Tensor:
    """Extreme of Ā over all prefixes after each (prefix, token), [count]; 0 at the last token. Fixed length only."""
    table = gain.view(tree.responses, tree.horizon).flip(1)
    running = (table.cummin(1) if kind == "amin" else table.cummax(1)).values.flip(1)
    after = torch.cat([running[:, 1:], torch.zeros(tree.responses, 1, dtype=torch.float64)], 1).flatten()
    return torch.zeros(count, dtype=torch.float64).scatter_reduce(0, cells, after, kind, include_self=False)


def surrogate(tasks: int) -> Outcome:
    """L_tok agrees with E[r] to first order at π_old, and the KL bounds its error (a trust region).

    S(π) = J(μ) + E_μ Σ_t (r_t − 1) r(y) = J(μ) + Σ_s d^μ(s) Ā(s), while J(π) = J(μ) + Σ_s d^π(s) Ā(s). Hence
    |J − S| ≤ Σ_t 2 TV_t·max|Ā| ≤ Σ_{t<T} 2tα·α = T(T−1)α² ≤ T(T−1)·max_s KL/2, rewards in [0, 1], α = max_s TV.
    Falsified by different slopes at π_old, an error not of second order, or one beyond the bound.
    """
    seeds = range(tasks)
    slopes = [_slope_ratio(random_case(3, 4, 9, seed)) for seed in seeds]
    orders = [_error_order(random_case(3, 4, 9, seed)) for seed in seeds]
    scatter = [
        _surrogate_error(case, case.policy + h * case.direction)
        for seed in seeds
        for case in (random_case(3, 4, 9, seed),)
        for h in (0.05, 0.2, 0.5, 1.0, 2.0)
    ]
    learned = [_learned_error(seed, k) for seed in seeds for k in (1, 4, 16)]
    line = random_case(3, 4, 9, 0)
    steps = torch.linspace(-0.5, 0.5, 41).tolist()
    along = [_surrogate_error(line, line.policy + h * line.direction) for h in steps]
    shares = [e.error / e.bound for e in (*scatter, *learned, *along) if e.bound > 0]
    return Outcome(
        checks=(
            equal("slope of the surrogate over slope of E[r] at π_old", 1.0, mean(slopes), 1e-3),
            equal("order of the error in the step", 2.0, mean(orders), 0.05),
            at_most("largest error over its bound", 1.0, shares),
        ),
        draw=lambda figure: _draw_surrogate(figure, dict(zip(steps, along, strict=True)), scatter, learned),
        notes=(f"the bound is loose: errors reach at most {max(shares):.1%} of it",),
    )


def _draw_surrogate(
    figure: "Figure",
    line: dict[float, "SurrogateError"],
    scatter: list["SurrogateError"],
    learned: list["SurrogateError"],
) -> None:
    steps, along = list(line), list(line.values())
    left, right = plots.panels(figure, 2)
    left.plot(steps, [e.reward for e in along], color=plots.BLUE, label="E[r]")
    left.plot(steps, [e.surrogate for e in along], color=plots.ORANGE, label="surrogate L_tok")
    low, high = left.get_ylim()
    left.fill_between(
        steps,
        [e.surrogate - e.bound for e in along],
        [e.surrogate + e.bound for e in along],
        color=plots.ORANGE,
        alpha=0.12,
        linewidth=0,
        label="± T(T−1)·max KL/2",
    )
    left.set(title="Tangent at π_old", xlabel="step along a direction", ylabel="value", ylim=(low - 0.05, high + 0.1))
    for found, color, label in ((scatter, plots.GREY, "random direction"), (learned, plots.BLUE, "learner steps")):
        right.loglog([e.bound for e in found], [e.error for e in found], "o", color=color, markersize=3.5, label=label)
    ends = [min(e.bound for e in scatter), max(e.bound for e in scatter)]
    right.plot(ends, ends, color=plots.RED, linewidth=1, label="the bound")
    right.set(title="Error against its bound", xlabel="T(T−1)·max KL/2", ylabel="|E[r] − surrogate|")
    for axes in (left, right):
        axes.legend()


class SurrogateError(NamedTuple):
    reward: float
    surrogate: float
    bound: float

    @property
    def error(self) -> float:
        return abs(self.reward - self.surrogate)


def _surrogate_error(case: Case, policy: Tensor, behavior: Tensor | None = None) -> SurrogateError:
    """J and S at `policy`, data from `behavior` (the case's own policy).

    A ratio is its own derivative in its logarithm, so the coefficients of `is_token` sum to its value Σ_t r_t·r(y).
    """
    tree, behavior = case.tree, case.policy if behavior is None else behavior
    under_mu = tree.probabilities(behavior)[tree.response_index]

    def value(at: Tensor) -> float:
        situation = Situation(tree=tree, behavior=behavior, policy=at, rewards=case.rewards)
        return float(under_mu @ response_coefficients(situation, "is_token"))

    old = float(exact.expected_reward(tree, behavior, case.rewards))
    return SurrogateError(
        reward=float(exact.expected_reward(tree, policy, case.rewards)),
        surrogate=old + value(policy) - value(behavior),
        bound=tree.horizon * (tree.horizon - 1) * float(exact.token_kl(policy, behavior).max()) / 2,
    )


def _learned_error(seed: int, steps: int) -> SurrogateError:
    case = random_case(3, 4, 9, 50 + seed)
    passed = learner_steps(case.tree, case.policy, case.rewards, steps, case.generator)
    return _surrogate_error(case, passed[-1], passed[0])


def _slope_ratio(case: Case) -> float:
    """Central differences of S and of J along the case's direction, at μ."""
    ahead, behind = (_surrogate_error(case, case.policy + h * case.direction) for h in (1e-4, -1e-4))
    return (ahead.surrogate - behind.surrogate) / (ahead.reward - behind.reward)


def _error_order(case: Case) -> float:
    far, near = (_surrogate_error(case, case.policy + h * case.direction).error for h in (2e-3, 1e-3))
    return local_slope(far, near)
