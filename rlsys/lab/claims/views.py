"""Claims 1 and 5: the bandit's and the token-level view of the policy gradient, on and off policy."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from rlsys.lab import exact, plots
from rlsys.lab.claims.cases import Case, both_views, local_slope, random_case, relative_error, token_drift
from rlsys.lab.claims.outcome import Outcome, at_least, at_most, equal
from rlsys.lab.estimate import Estimate, mean, share
from rlsys.lab.estimators import Situation, response_coefficients
from rlsys.lab.staleness import learner_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def same_gradient_on_policy(tasks: int) -> Outcome:
    """On-policy, the bandit gradient E[r ∇log π(y)] and the token-level one E[Σ_t r ∇log π(y_t|s_t)] are the same.

    Because log π(y) = Σ_t log π(y_t|s_t), and at μ = π all weights are 1: `is_sequence` and `is_token` differ in no
    response. Falsified by any difference beyond rounding; the same measurement off-policy shows that it can differ.
    """
    shapes = ((2, 6, False), (3, 4, True), (4, 5, False), (6, 3, True))
    response, wrong, off = [], [], []
    for vocabulary, horizon, ends in shapes:
        for seed in range(tasks // 2):
            case = random_case(vocabulary, horizon, 1, seed, ends=ends)
            situation = Situation(tree=case.tree, behavior=case.policy, policy=case.policy, rewards=case.rewards)
            per_token, whole = (response_coefficients(situation, name) for name in ("is_token", "is_sequence"))
            response.append(float((per_token - whole).abs().max()))
            truth = exact.reward_gradient(case.tree, case.policy, case.rewards)
            wrong += [relative_error(view.mean, truth) for view in both_views(case, case.policy, case.policy)]
            token, sequence = both_views(case, case.policy + 0.3 * case.direction, case.policy)
            off.append(relative_error(token.mean, sequence.mean))
    drifts = [10 ** (e / 4) for e in range(-12, 1)]
    curves = {t: _gap_curve(random_case(3, t, 1, 99), drifts) for t in (2, 4, 6)}
    sample = random_case(3, 4, 1, 99)

    def draw(figure: "Figure") -> None:
        left, right = plots.panels(figure, 2)
        for behavior, color, label in (
            (sample.policy + 0.5 * sample.direction, plots.ORANGE, "off-policy"),
            (sample.policy, plots.BLUE, "on-policy"),
        ):
            token, sequence = both_views(sample, behavior, sample.policy)
            left.plot(sequence.mean.flatten(), token.mean.flatten(), "o", color=color, label=label, alpha=0.7)
        low, high = left.get_xlim()
        left.plot([low, high], [low, high], color=plots.GREY, linewidth=1, zorder=0)
        left.set(title="Every component of the gradient", xlabel="bandit: is_sequence", ylabel="token level: is_token")
        left.legend()
        for (t, (x, y)), color in zip(curves.items(), plots.SCALE[1:], strict=False):
            right.loglog(x, y, "o-", color=color, label=f"T = {t}")
        right.set(
            title="The difference vanishes with the drift",
            xlabel="token drift √E(r−1)²",
            ylabel="‖difference‖ / ‖∇J‖",
        )
        right.legend()

    return Outcome(
        checks=(
            equal("on-policy: largest difference of both gradients of one response", 0.0, response, 1e-12),
            equal("on-policy: largest ‖mean − ∇J‖/‖∇J‖ of both", 0.0, wrong, 1e-12),
            at_least("smallest off-policy difference (the measurement can tell)", 1e-3, off),
        ),
        draw=draw,
    )


def _gap_curve(case: Case, drifts: list[float]) -> tuple[list[float], list[float]]:
    truth = exact.reward_gradient(case.tree, case.policy, case.rewards)
    x, y = [], []
    for h in drifts:
        behavior = case.policy + h * case.direction
        token, sequence = both_views(case, behavior, case.policy)
        x.append(token_drift(case.tree, case.policy, behavior))
        y.append(float((token.mean - sequence.mean).norm() / truth.norm()))
    return x, y


STEPS = (1, 2, 4, 8, 16)
"""Ages of the data in the survey, in learner steps."""


class Setting(NamedTuple):
    """One setting of the survey behind claim 5, and what both views do in it."""

    horizon: int
    seed: int
    direction: str
    baseline: str
    steps: int
    variance_ratio: float
    """Var(L_tok)/Var(L_seq), per response."""
    break_even: float
    """n* = (Var(L_seq) − Var(L_tok))/bias²(L_tok): with fewer responses L_tok has the lower MSE."""
    drift: float


def unbiased_or_low_variance(tasks: int) -> Outcome:
    """Off-policy L_seq is unbiased and L_tok is not; L_tok usually varies less, and has the lower MSE up to a drift.

    E_μ[w ∇log π(y) r] = ∇J, while L_tok keeps the prefixes and the Q of μ: a bias linear in the drift, none at T = 1.
    To first order Var(L_tok) − Var(L_seq) = −2 Σ_t E[A² ‖∇log π_t‖² Σ_{u≠t} log r_u]: negative as long as the responses
    with large A² became *more* likely. Hence the settings where "usually" fails: a policy that moved away from the
    reward, and (for a rare reward) a baseline at small drift. MSE = bias² + Var/n: L_tok wins while n < n*.
    Falsified by a bias of L_seq, another order of the bias of L_tok, or if L_tok did not usually vary less where a
    learner climbs its reward.
    """
    seeds = range(tasks // 3)
    biases = [_biases(random_case(3, 4, 5, seed)) for seed in seeds]
    single = [_biases(random_case(4, 1, 5, seed)) for seed in seeds]
    horizons = (2, 3, 4, 5, 6)
    survey = [setting for horizon in horizons for seed in seeds for setting in _survey(horizon, seed)]
    climbing = [s for s in survey if s.direction == "toward the reward"]
    retreating = [s for s in survey if s.direction == "away from the reward"]
    centred = [s for s in climbing if s.baseline == "mean" and s.steps == 1]
    plain = [s for s in climbing if s.baseline == "none"]
    early, late = ([s for s in plain if s.steps == k] for k in (STEPS[0], STEPS[-1]))
    short, long = ([s for s in plain if s.horizon == t] for t in (horizons[0], horizons[-1]))

    return Outcome(
        checks=(
            equal("largest bias of L_seq, over ‖∇J‖", 0.0, (b.sequence for b in biases), 1e-10),
            equal("largest bias of L_tok at T = 1", 0.0, (b.token for b in single), 1e-10),
            equal("order of the bias of L_tok in the drift", 1.0, mean([b.order for b in biases]), 0.05),
            at_least("share of settings with Var L_tok < Var L_seq, learner climbing", 0.5, _lower(climbing)),
            at_least("…without a baseline", 0.9, _lower(plain)),
            at_most("it fails: policy moved away from the reward (share)", 0.25, _lower(retreating)),
            at_most("it fails: mean baseline, data one step old (share)", 0.5, _lower(centred)),
            at_least(
                f"n* of data 1 step old exceeds that of {STEPS[-1]} steps (share of pairs)", 0.5, _wins(early, late)
            ),
            at_least(
                f"n* at T = {horizons[-1]} exceeds that at T = {horizons[0]} (share of pairs)", 0.5, _wins(long, short)
            ),
        ),
        draw=lambda figure: _draw_views(figure, survey, horizons),
        notes=tuple(_names_of_failures(survey)),
    )


class Biases(NamedTuple):
    sequence: float
    token: float
    order: float


def _biases(case: Case) -> Biases:
    """Relative biases at a large drift, and the order in h of that of L_tok between h = 2e-3 and 1e-3."""
    truth = exact.reward_gradient(case.tree, case.policy, case.rewards)

    def at(h: float) -> tuple[float, float]:
        token, sequence = both_views(case, case.policy + h * case.direction, case.policy)
        return relative_error(token.mean, truth), relative_error(sequence.mean, truth)

    far, near, large = at(2e-3), at(1e-3), at(1.0)
    order = local_slope(far[0], near[0]) if near[0] > 1e-12 else 0.0
    return Biases(sequence=large[1], token=large[0], order=order)


def _survey(horizon: int, seed: int) -> Iterator[Setting]:
    """Learners that climb or descend the reward, and an aimless drift of the same size; as old as STEPS."""
    case = random_case(3, horizon, 5, 100 + seed)
    up = learner_steps(case.tree, case.policy, case.rewards, STEPS[-1], case.generator)
    down = learner_steps(case.tree, case.policy, -case.rewards, STEPS[-1], case.generator)
    for steps in STEPS:
        pairs: dict[str, tuple[Tensor, Tensor]] = {
            "toward the reward": (up[-1 - steps], up[-1]),
            "away from the reward": (down[-1 - steps], down[-1]),
            "aimless": (case.policy, case.policy + 0.05 * steps * case.direction),
        }
        for direction, (behavior, policy) in pairs.items():
            truth = exact.reward_gradient(case.tree, policy, case.rewards)
            average = float(exact.expected_reward(case.tree, behavior, case.rewards))
            for name, baseline in (("none", 0.0), ("mean", average)):
                token, sequence = both_views(case, behavior, policy, baseline)
                yield Setting(
                    horizon=horizon,
                    seed=seed,
                    direction=direction,
                    baseline=name,
                    steps=steps,
                    variance_ratio=token.variance / sequence.variance,
                    break_even=(sequence.variance - token.variance) / float((token.mean - truth).square().sum()),
                    drift=token_drift(case.tree, policy, behavior),
                )


def _lower(settings: list[Setting]) -> Estimate:
    """Share of settings where L_tok varies less; the interval is over tasks, as a task's settings are kin."""
    tasks: dict[tuple[int, int], list[bool]] = {}
    for s in settings:
        tasks.setdefault((s.horizon, s.seed), []).append(s.variance_ratio < 1)
    return mean([sum(lower) / len(lower) for lower in tasks.values()])


def _wins(above: list[Setting], below: list[Setting]) -> Estimate:
    """How often n* is larger in `above` than in its counterpart."""
    pairs = [(a.break_even, b.break_even) for a, b in zip(above, below, strict=True)]
    return share(sum(a > b for a, b in pairs), len(pairs))


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _names_of_failures(survey: list[Setting]) -> Iterator[str]:
    """Each kind of setting in which L_tok does not usually have the lower variance."""
    kinds = sorted({(s.direction, s.baseline, s.steps) for s in survey})
    for direction, baseline, steps in kinds:
        own = [s for s in survey if (s.direction, s.baseline, s.steps) == (direction, baseline, steps)]
        lower = sum(s.variance_ratio < 1 for s in own)
        if lower <= len(own) / 2:
            yield (
                f"fails: policy {steps} step{'s' if steps > 1 else ''} {direction}, baseline {baseline}: "
                f"Var L_tok < Var L_seq in {lower} of {len(own)}, median ratio "
                f"{_median([s.variance_ratio for s in own]):.2f}"
            )


def _draw_views(figure: "Figure", survey: list[Setting], horizons: tuple[int, ...]) -> None:
    left, right = plots.panels(figure, 2)
    marks = {"toward the reward": plots.BLUE, "aimless": plots.GREY, "away from the reward": plots.RED}
    for direction, color in marks.items():
        for baseline, marker in (("none", "o"), ("mean", "^")):
            own = [s for s in survey if s.direction == direction and s.baseline == baseline]
            left.loglog(
                [s.drift for s in own],
                [s.variance_ratio for s in own],
                marker,
                color=color,
                alpha=0.55,
                markersize=4,
                markeredgewidth=0,
                label=direction if baseline == "none" else None,
            )
    left.axhline(1.0, color=plots.INK, linewidth=1)
    left.set(
        title="Variance: below 1 the token view wins", xlabel="token drift √E(r−1)²", ylabel="Var L_tok / Var L_seq"
    )
    left.plot([], [], "^", color=plots.INK, markersize=4, label="▲ mean baseline, ● none")
    left.legend()
    for horizon, color in zip(horizons, plots.SCALE, strict=False):
        own = [
            s for s in survey if s.horizon == horizon and s.direction == "toward the reward" and s.baseline == "none"
        ]
        points = []
        for steps in STEPS:
            at = [s for s in own if s.steps == steps]
            points.append((_median([s.drift for s in at]), _median([s.break_even for s in at])))
        right.loglog([x for x, _ in points], [y for _, y in points], "o-", color=color, label=f"T = {horizon}")
    right.set(
        title="MSE: the token view wins below the line",
        xlabel="token drift √E(r−1)²",
        ylabel="break-even number of responses n*",
    )
    right.legend()
