"""Claims 2, 3 and 6: what the length of a response does to its importance weight.

In 2 and 3 the behaviour policy is uniform and the length fixed, so that the responses of the tree are equally likely
and the system's own `weight_diagnostics`, run once over the tree, are exact expectations under μ.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlsys.algo.batch import BatchTotals, TokenBatch
from rlsys.algo.diagnostics import weight_diagnostics
from rlsys.algo.objectives import policy_loss
from rlsys.lab import exact, plots
from rlsys.lab.claims.cases import local_slope
from rlsys.lab.claims.outcome import Outcome, at_least, at_most, equal
from rlsys.lab.estimate import Estimate, mean, ratio_of_means, share
from rlsys.lab.tree import Tree, by_position, make_tree, random_policy, seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HORIZONS = (1, 2, 3, 4, 5, 6)


def weight_variance(tasks: int) -> Outcome:
    """The variance of the sequence weight w = Π_t r_t grows exponentially with T; that of a token weight does not.

    E_μ[r_t | s_t] = 1, so E_μ[w²] = Π_t(1 + χ²_t) where χ²_t does not depend on the prefix; in general E_μ[w²] lies
    between (1 + min χ²)^T and (1 + max χ²)^T over prefixes. Falsified by an enumerated variance off the product or
    outside these bounds, a logarithm that does not grow in proportion to T, or token variances that grow.
    """
    row = torch.randn(4, generator=seeded(2), dtype=torch.float64)
    errors, shown = [], {}
    for drift in (0.1, 0.3, 0.6):
        chi2 = float(exact.token_chi2(drift * row[None], torch.zeros(1, 4, dtype=torch.float64)))
        found = {t: _uniform_diagnostics(4, t, drift * row.expand(t, 4)) for t in HORIZONS}
        errors += [abs(found[t]["chi2_sequence"] / ((1 + chi2) ** t - 1) - 1) for t in HORIZONS]
        errors += [abs(found[t]["chi2_token"] / chi2 - 1) for t in HORIZONS]
        shown[drift] = (chi2, [found[t]["chi2_sequence"] for t in HORIZONS], [found[t]["chi2_token"] for t in HORIZONS])
    growth, token, outside = _prefix_dependent(25 * tasks)

    def draw(figure: "Figure") -> None:
        left, right = plots.panels(figure, 2)
        long = [2 ** (k / 4) for k in range(29)]
        for (drift, (chi2, sequence, single)), color in zip(shown.items(), plots.SCALE[1:4], strict=True):
            left.loglog(long, [(1 + chi2) ** t - 1 for t in long], "--", color=color, linewidth=1)
            left.loglog(HORIZONS, sequence, "o", color=color, label=f"w, log-ratios ×{drift}")
            left.loglog(HORIZONS, single, "s", color=color, markerfacecolor="white", markersize=4)
        left.set(
            title="Same drift at every prefix", xlabel="length T", ylabel="variance of the weight", ylim=(1e-3, 1e6)
        )
        left.plot([], [], "--", color=plots.GREY, linewidth=1, label="Π(1 + χ²) − 1")
        left.plot([], [], "s", color=plots.GREY, markerfacecolor="white", markersize=4, label="one token's weight")
        left.legend()
        for values, color, label in ((growth, plots.BLUE, "log(1 + Var w)"), (token, plots.ORANGE, "log(1 + Var r)")):
            plots.with_intervals(right, HORIZONS, [mean(at) for at in values], color=color, label=label)
        right.set(
            title="Drift that depends on the prefix", xlabel="length T", ylabel="mean over random policies (nats)"
        )
        right.legend()

    return Outcome(
        checks=(
            equal("largest relative error of Π(1 + χ²_t) − 1, and of χ² for one token", 0.0, errors, 1e-9),
            at_most("prefix-dependent drift: cases outside the two bounds", 0, outside),
            equal(
                "log(1 + Var w) at T = 6 over T = 1, prefix-dependent", 6.0, ratio_of_means(growth[5], growth[0]), 1.0
            ),
            equal(
                "log(1 + Var r_t) at T = 6 over T = 1, prefix-dependent", 1.0, ratio_of_means(token[5], token[0]), 0.2
            ),
        ),
        draw=draw,
    )


def _uniform_diagnostics(vocabulary: int, horizon: int, rows: Tensor) -> dict[str, float]:
    """`weight_diagnostics` of π = softmax(rows[position]) against uniform μ: exact, as the responses weigh the same."""
    tree = make_tree(vocabulary, horizon)
    return tree_diagnostics(tree, by_position(tree, rows))


def tree_diagnostics(tree: Tree, policy: Tensor) -> dict[str, float]:
    log_ratio = tree.logprobs(policy) + math.log(tree.vocabulary)
    everything = torch.ones_like(tree.token_ids, dtype=torch.bool)
    found = weight_diagnostics(log_ratio, everything, tree.response_index, tree.responses)
    return {name.removeprefix("importance/"): float(value) for name, value in found.items() if value is not None}


def _prefix_dependent(policies: int) -> tuple[list[list[float]], list[list[float]], int]:
    """log(1 + χ²) of w and of r_t after the first t tokens of random policies, [t][policy]; how often E w² left its
    bounds. Prefixes are numbered by depth, so the first rows of a policy are the policy of shorter responses."""
    trees = [make_tree(3, t) for t in HORIZONS]
    drawn = [random_policy(trees[-1], seeded(2, number), 0.4) for number in range(policies)]
    growth: list[list[float]] = []
    token: list[list[float]] = []
    outside = 0
    for tree in trees:
        found = [tree_diagnostics(tree, policy[: tree.prefixes]) for policy in drawn]
        growth.append([math.log1p(one["chi2_sequence"]) for one in found])
        token.append([math.log1p(one["chi2_token"]) for one in found])
        for policy, one in zip(drawn, found, strict=True):
            per_prefix = exact.token_chi2(policy[: tree.prefixes], torch.zeros(tree.prefixes, 3, dtype=torch.float64))
            low, high = ((1 + float(edge)) ** tree.horizon for edge in (per_prefix.min(), per_prefix.max()))
            outside += not low * (1 - 1e-12) <= 1 + one["chi2_sequence"] <= high * (1 + 1e-12)
    return growth, token, outside


def linearization(tasks: int) -> Outcome:
    """Π_t r_t ≈ 1 + Σ_t(r_t − 1) while the policies are close: the error is of second order in the drift.

    Π r is the sum over all subsets of tokens of Π(r_t − 1); what is left out starts with pairs. Where χ² does not
    depend on the prefix the products are orthogonal under μ, so the mean square of the error is exactly
    (1 + χ²)^T − 1 − Tχ² ≈ T(T−1)/2·χ⁴, and E|error|, `importance/linearization_gap`, is at most its root: it reaches
    1% (10%) no earlier than that does. Falsified by another order, a mean square off the formula, or an earlier exit.
    """
    row = torch.randn(4, generator=seeded(3), dtype=torch.float64)
    orders = [_order_of_gap(make_tree(3, 4), seed) for seed in range(tasks)]
    squares = [_square_error(t, h * row) for t in (2, 4, 6) for h in (0.02, 0.2, 0.8)]
    horizons = (2, 3, 4, 5, 6)
    exits = {(t, level): _exit(row, t, level) for t in horizons for level in (0.01, 0.10)}
    curves = {t: _gap_curve(row, t) for t in horizons}

    def draw(figure: "Figure") -> None:
        left, right = plots.panels(figure, 2)
        for (t, points), color in zip(curves.items(), plots.SCALE, strict=False):
            left.loglog(
                [x for x, _ in points], [y for _, y in points], "o-", markersize=3, color=color, label=f"T = {t}"
            )
        for level in (0.01, 0.10):
            left.axhline(level, color=plots.RED, linewidth=1, linestyle=":")
            left.annotate(f"{level:.0%}", (left.get_xlim()[0], level), va="bottom", color=plots.RED, fontsize=9)
        left.set(title="Slope 2 in the drift", xlabel="token drift √E(r−1)²", ylabel="E|Π r − 1 − Σ(r − 1)|")
        left.legend(loc="lower right")
        for level, color in ((0.01, plots.BLUE), (0.10, plots.ORANGE)):
            right.plot(horizons, [exits[t, level][0] for t in horizons], "o-", color=color, label=f"error {level:.0%}")
            right.plot(horizons, [exits[t, level][1] for t in horizons], "--", color=color, linewidth=1)
        right.plot([], [], "--", color=plots.GREY, linewidth=1, label="root of (1+χ²)^T − 1 − Tχ²")
        right.set(title="Where it leaves", xlabel="length T", ylabel="token drift √E(r−1)²", ylim=(0, None))
        right.set_xticks(horizons)
        right.legend()

    return Outcome(
        checks=(
            equal("order of the error in the drift", 2.0, mean(orders), 0.05),
            equal("largest relative error of E(error)² = (1+χ²)^T − 1 − Tχ²", 0.0, squares, 1e-6),
            at_least("smallest (exit drift)/(predicted lower limit)", 1.0, (a / b for a, b in exits.values())),
            at_most("largest (exit drift)/(predicted lower limit)", 2.0, (a / b for a, b in exits.values())),
        ),
        draw=draw,
        notes=tuple(
            f"T = {t} the error leaves 1% at a token drift of {exits[t, 0.01][0]:.3f}, 10% at {exits[t, 0.1][0]:.3f}"
            for t in horizons
        ),
    )


def _order_of_gap(tree: Tree, seed: int) -> float:
    direction = random_policy(tree, seeded(3, seed))
    far, near = (tree_diagnostics(tree, h * direction)["linearization_gap"] for h in (2e-3, 1e-3))
    return local_slope(far, near)


def _square_error(horizon: int, row: Tensor) -> float:
    """Relative error of the formula for E(Π r − 1 − Σ(r−1))² under uniform μ."""
    tree = make_tree(4, horizon)
    ratio = (tree.logprobs(row.expand(tree.prefixes, 4)) + math.log(4)).exp().view(tree.responses, horizon)
    measured = float((ratio.prod(1) - 1 - (ratio - 1).sum(1)).square().mean())
    return abs(measured / _predicted_square(_chi2(row), horizon) - 1)


def _predicted_square(chi2: float, horizon: int) -> float:
    """(1 + χ²)^T − 1 − Tχ², summed from its binomial terms so that small χ² loses no digits."""
    return sum(math.comb(horizon, k) * chi2**k for k in range(2, horizon + 1))


def _chi2(row: Tensor) -> float:
    return float(exact.token_chi2(row[None], torch.zeros(1, len(row), dtype=torch.float64)))


def _exit(row: Tensor, horizon: int, level: float) -> tuple[float, float]:
    """Token drift at which the gap reaches `level`, measured; and at which the root of the mean square does."""
    measured = _bisect(
        lambda h: _uniform_diagnostics(4, horizon, h * row.expand(horizon, 4))["linearization_gap"], level
    )
    predicted = _bisect(lambda h: math.sqrt(_predicted_square(_chi2(h * row), horizon)), level)
    return math.sqrt(_chi2(measured * row)), math.sqrt(_chi2(predicted * row))


def _bisect(function: Callable[[float], float], level: float) -> float:
    low, high = 0.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < level else (low, middle)
    return high


def _gap_curve(row: Tensor, horizon: int) -> list[tuple[float, float]]:
    return [
        (math.sqrt(_chi2(h * row)), _uniform_diagnostics(4, horizon, h * row.expand(horizon, 4))["linearization_gap"])
        for h in (10 ** (e / 4) for e in range(-10, 1))
    ]


def clipping(tasks: int) -> Outcome:
    """Clipping the sequence weight hits nearly all long responses; clipping each token's hits few tokens.

    log w is a sum of T terms: its mean falls as −T·KL and its spread grows as √T·σ, so a fixed band holds a share that
    falls to 0, Φ-shares of the normal law with these moments. The token share has no T in it. The losses are
    `is_sequence_truncated` and `is_token_truncated` (ε = 0.2), which count what lies outside; responses are as long as
    512 tokens, so they are sampled. Falsified by a sequence share that stays small, or a token share that grows.
    """
    lengths = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    responses = 2000
    drift = 0.1
    rows = torch.randn(512, 6, generator=seeded(6), dtype=torch.float64)
    moved = rows + drift * torch.randn(512, 6, generator=seeded(6, 1), dtype=torch.float64)
    shares = {t: _outside(rows[:t], moved[:t], responses) for t in lengths}
    laws = {t: (_normal_share(rows[:t], moved[:t]), _token_share(rows[:t], moved[:t])) for t in lengths}
    distances = [_distance(shares[t][0], laws[t][0]) for t in lengths if t >= 16]
    last = lengths[-1]

    return Outcome(
        checks=(
            at_least(f"share of responses outside the band at T = {last}", 0.85, shares[last][0]),
            at_most(f"share of tokens outside the band at T = {last}", 0.08, shares[last][1]),
            equal(f"share of tokens at T = {last} against its exact value", laws[last][1], shares[last][1], 0.01),
            at_most("largest distance from the normal law, T ≥ 16", 0.07, max(distances, key=lambda e: e.high)),
            at_most("share of responses outside at T = 1, where both weights are one", 0.2, shares[1][0]),
        ),
        draw=lambda figure: _draw_clipping(figure, shares, laws),
    )


def _draw_clipping(
    figure: "Figure", shares: dict[int, tuple[Estimate, Estimate]], laws: dict[int, tuple[float, float]]
) -> None:
    (axes,) = plots.panels(figure, 1)
    lengths = list(shares)
    for which, color, label, law in (
        (0, plots.BLUE, "sequence weight w", "normal law for log w"),
        (1, plots.ORANGE, "token weight r", "exact, per token"),
    ):
        plots.with_intervals(axes, lengths, [shares[t][which] for t in lengths], "o", color=color, label=label)
        axes.plot(lengths, [laws[t][which] for t in lengths], "--", color=color, linewidth=1, label=law)
    axes.set_xscale("log")
    axes.set_xticks(lengths, [str(t) for t in lengths])
    axes.minorticks_off()
    axes.set(xlabel="length T", ylabel="share outside [0.8, 1.2]", ylim=(-0.02, 1.02))
    axes.legend(loc="center left")


def _distance(found: Estimate, law: float) -> Estimate:
    """|found − law|, with the farthest that the interval allows."""
    return Estimate(abs(found.value - law), (0.0, max(abs(found.low - law), abs(found.high - law))))


def _outside(rows: Tensor, moved: Tensor, responses: int) -> tuple[Estimate, Estimate]:
    """Shares of responses, and of tokens, whose weight leaves [0.8, 1.2], as the two losses count them."""
    horizon = len(rows)
    drawn = torch.multinomial(rows.softmax(-1), responses, replacement=True, generator=seeded(6, horizon)).T
    position = torch.arange(horizon).expand(responses, horizon)
    policy, behavior = (p.log_softmax(-1)[position, drawn].flatten() for p in (moved, rows))
    batch = TokenBatch(
        policy_logprobs=policy,
        behavior_logprobs=behavior,
        step_start_logprobs=policy,
        advantages=torch.ones_like(policy),
        loss_mask=torch.ones_like(policy, dtype=torch.bool),
        response_index=torch.arange(responses).repeat_interleave(horizon),
        responses=responses,
    )
    totals = BatchTotals(tokens=len(policy), responses=responses, max_tokens=horizon)
    sequence, token = (
        policy_loss(batch, totals, objective=name, reduce="constant").outside
        for name in ("is_sequence_truncated", "is_token_truncated")
    )
    return share(int(sequence.sum()) // horizon, responses), share(int(token.sum()), len(token))


def _normal_share(rows: Tensor, moved: Tensor) -> float:
    """Share of N(Σ_t E log r_t, Σ_t Var log r_t) outside [log 0.8, log 1.2]."""
    mu, log_ratio = rows.softmax(-1), moved.log_softmax(-1) - rows.log_softmax(-1)
    centre = (mu * log_ratio).sum(-1)
    spread = (mu * log_ratio.square()).sum(-1) - centre.square()
    law = NormalDist(float(centre.sum()), math.sqrt(float(spread.sum())))
    return 1 - law.cdf(math.log(1.2)) + law.cdf(math.log(0.8))


def _token_share(rows: Tensor, moved: Tensor) -> float:
    ratio = moved.softmax(-1) / rows.softmax(-1)
    return float((rows.softmax(-1) * ((ratio < 0.8) | (ratio > 1.2))).sum(-1).mean())
