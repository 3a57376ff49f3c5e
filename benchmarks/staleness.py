"""How far off-policy can one learn, with which correction? Real asynchronous runs at forced staleness.

    python -m benchmarks.staleness [--seeds 0 1 2] [--bounds 0 1 4 16] [--arms ppo_clip tis ...]

Every cell of the table is one `rlsys train configs/staleness.yaml`: the queue keeps as many batches as the bound
allows (`staleness.backlog`), so that once it is filled every trained token is exactly that many versions old. Runs that
are already kept are not repeated: the command continues where it was interrupted, and draws what it has.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import BASELINES, keep, say

CONFIG = "configs/staleness.yaml"
PLOT = Path("docs/assets/staleness.png")

ARMS: dict[str, list[str]] = {
    "none": ["objective.name=reinforce"],
    "ppo_clip": ["objective.name=ppo_clip"],
    "tis": ["objective.name=ppo_clip", "objective.correction.name=tis"],
    "m2": ["objective.name=ppo_clip", "objective.correction.name=m2"],
    "gspo": ["objective.name=gspo"],
    "decoupled_ppo": ["objective.name=decoupled_ppo"],
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
        for bound in reversed(arguments.bounds):
            for arm in arguments.arms:
                key = f"{arm}, staleness {bound}, seed {seed}"
                if key not in runs:
                    runs[key] = {"arm": arm, "bound": bound, "seed": seed, **run(arm, bound, seed)}
                    keep("staleness", "python -m benchmarks.staleness", {"runs": runs})
                    draw(runs)
                say(f"{key:<36} {runs[key]}")


def run(arm: str, bound: int, seed: int) -> dict[str, Any]:
    """One run by the command line; what it came to, read from its own metrics."""
    scratch = Path(tempfile.mkdtemp())
    forced = [f"staleness.max={bound}", "staleness.serving_lag=0", f"staleness.backlog={bound}"]
    overrides = [*ARMS[arm], *forced, f"seed={seed}", f"run_dir={scratch}"]
    command = [sys.executable, "-m", "rlsys.cli", "train", CONFIG, "--json", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (scratch / "staleness" / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(scratch)
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
