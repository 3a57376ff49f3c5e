"""How far off-policy can one learn, with which correction? Real asynchronous runs at forced staleness.

    python -m benchmarks.staleness [--seeds 0 1 2] [--bounds 0 1 4 16] [--arms ppo_clip tis ...]

Every cell of the table is one run of the control loop over `configs/staleness.yaml`: the queue keeps as many batches
as the bound allows (`staleness.backlog`), so that once it is filled every trained token is exactly that many versions
old. The cells of a seed share its rollout and reward actors, which know nothing of objectives; each has a learner, a
weight-sync service and a ledger of its own. Runs that are already kept are not repeated: the command continues where it
was interrupted, and draws what it has.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import BASELINES, keep, say
from benchmarks.workers import Workers
from rlsys.config import RunConfig, load_config

CONFIG = "configs/staleness.yaml"
PLOT = Path("docs/assets/staleness.png")

ARMS: dict[str, list[str]] = {
    "none": ["objective.name=reinforce"],
    "ppo_clip": ["objective.name=ppo_clip"],
    "tis": ["objective.name=ppo_clip", "objective.correction.name=tis"],
    "m2": ["objective.name=ppo_clip", "objective.correction.name=m2"],
    "gspo": ["objective.name=gspo"],
    "decoupled_ppo": ["objective.name=decoupled_ppo"],
    "ppo_clip, ESS window": ["objective.name=ppo_clip", "staleness.controller=ess"],
    "none, ESS window": ["objective.name=reinforce", "staleness.controller=ess"],
}
BOUNDS = (0, 1, 4, 16)
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95% quantiles of Student's t by number of samples."""

Runs = Mapping[str, Mapping[str, Any]]


def main() -> None:
    """Run what is missing, print, keep and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bounds", type=int, nargs="+", default=list(BOUNDS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    arguments = parser.parse_args()
    path = BASELINES / "staleness.json"
    runs: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    for seed in arguments.seeds:
        cells = [(arm, bound) for bound in reversed(arguments.bounds) for arm in arguments.arms]
        missing = [cell for cell in cells if name(*cell, seed) not in runs]
        if not missing:
            continue
        with Workers(configured(*missing[0], seed)) as workers:
            for arm, bound in missing:
                found = outcome(workers.train(configured(arm, bound, seed)))
                runs[name(arm, bound, seed)] = {"arm": arm, "bound": bound, "seed": seed, **found}
                keep("staleness", "python -m benchmarks.staleness", {"runs": runs})
                draw(runs)
                say(f"{name(arm, bound, seed):<36} {found['before']:.3f} -> {found['after']:.3f}, {found}")
    say("\n".join(table(runs)))


def name(arm: str, bound: int, seed: int) -> str:
    """What a cell of one seed is kept under."""
    return f"{arm}, staleness {bound}, seed {seed}"


def configured(arm: str, bound: int, seed: int) -> RunConfig:
    """The configuration of one cell."""
    forced = [f"staleness.max={bound}", "staleness.serving_lag=0", f"staleness.backlog={bound}"]
    unseen = ["observability.prometheus=false", "observability.trace=false", "probe.fraction=0.0"]
    return load_config(CONFIG, [*ARMS[arm], *forced, *unseen, f"seed={seed}"])


def outcome(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run came to, from its own metrics."""
    steps = [row for row in rows if "reward/mean" in row]
    accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    late = steps[len(steps) // 2 :]
    return {
        "before": accuracy[0],
        "best": max(accuracy),
        "after": accuracy[-1],
        "staleness_mean": round(statistics.mean(s["staleness/mean"] for s in late), 3),
        "staleness_max": max(s["staleness/max"] for s in steps),
        "ess_token": round(statistics.mean(s["importance/ess_token"] for s in late), 4),
        "rewards": [round(s["reward/mean"], 4) for s in steps],
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% interval (Student's t); NaN half-width for a single value."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), STUDENT_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def table(runs: Runs) -> list[str]:
    """Accuracy after training by arm (rows) and staleness (columns), as Markdown."""
    bounds = sorted({run["bound"] for run in runs.values()})
    lines = ["| objective | " + " | ".join(f"staleness {b}" for b in bounds) + " |", "|---" * (len(bounds) + 1) + "|"]
    for arm in [arm for arm in ARMS if any(run["arm"] == arm for run in runs.values())]:
        cells = []
        for bound in bounds:
            values = [run["after"] for run in runs.values() if (run["arm"], run["bound"]) == (arm, bound)]
            mean, half = interval(values) if values else (math.nan, math.nan)
            spread = "" if math.isnan(half) else f" ± {half:.3f}"
            cells.append(f"{mean:.3f}{spread} (n={len(values)})" if values else "")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def draw(runs: Runs) -> None:
    """Accuracy against staleness for every arm, and the reward step by step at the largest staleness."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    bounds = sorted({run["bound"] for run in runs.values()})
    for index, arm in enumerate(ARMS):
        of_arm = [run for run in runs.values() if run["arm"] == arm]
        have = [b for b in bounds if any(run["bound"] == b for run in of_arm)]
        if not have:
            continue
        means, halves = zip(
            *(interval([run["after"] for run in of_arm if run["bound"] == b]) for b in have), strict=True
        )
        shifted = [bounds.index(b) + 0.06 * (index - 2.5) for b in have]
        left.errorbar(shifted, means, yerr=halves, marker="o", capsize=3, color=f"C{index}", label=arm)
        curves = [run["rewards"] for run in of_arm if run["bound"] == bounds[-1]]
        for number, rewards in enumerate(curves):
            right.plot(
                range(1, len(rewards) + 1), rewards, color=f"C{index}", alpha=0.8, lw=1.2, label=None if number else arm
            )
    left.set(xlabel="versions every token is old", ylabel="held-out accuracy after training", ylim=(-0.02, 1.02))
    left.set_xticks(range(len(bounds)), [str(b) for b in bounds])
    left.legend(frameon=False)
    right.set(xlabel="learner step", ylabel=f"mean reward at staleness {bounds[-1]}", ylim=(-0.02, 1.02))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PLOT, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
