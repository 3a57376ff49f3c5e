"""The picture a run leaves behind: reward and staleness over its steps."""

from pathlib import Path
from typing import Any

from rlsys.observability.run_directory import RunDirectory

BLUE, ORANGE, GREEN, RED, GREY = "#2f6fde", "#d9772b", "#2d9d6c", "#c8403a", "#8a8f98"


def plot_run(directory: RunDirectory) -> Path:
    """Draw `summary.png`: reward and held-out accuracy, staleness against its bound, ESS and clip fraction."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = directory.rows()
    steps = [row for row in rows if "reward/mean" in row]
    evals = [row for row in rows if "eval/accuracy" in row]
    figure, (reward, staleness, importance) = plt.subplots(3, 1, figsize=(10, 7), sharex=True, layout="constrained")

    _line(reward, steps, "reward/mean", BLUE, "mean reward of the batch")
    reward.plot(
        [row["step"] for row in evals],
        [row["eval/accuracy"] for row in evals],
        "o-",
        color=ORANGE,
        label="held-out greedy",
    )
    reward.set(ylabel="reward", ylim=(0, 1.03))

    _line(staleness, steps, "staleness/mean", BLUE, "mean")
    _line(staleness, steps, "staleness/in_flight/mean", GREEN, "of it in flight")
    _line(staleness, steps, "staleness/max", GREY, "oldest token")
    _line(staleness, steps, "staleness/bound", RED, "bound", linestyle="--")
    staleness.set(ylabel="staleness (versions)")
    staleness.set_ylim(bottom=-0.1)

    _line(importance, steps, "importance/ess_token", BLUE, "ESS, tokens")
    _line(importance, steps, "importance/ess_sequence", GREEN, "ESS, sequences")
    _line(importance, steps, "importance/clip_fraction", ORANGE, "clip fraction")
    importance.set(ylabel="fraction", xlabel="learner step", ylim=(0, 1.03))

    for axes in (reward, staleness, importance):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(directory.root.name)
    figure.savefig(directory.plot, dpi=120)
    plt.close(figure)
    return directory.plot


def _line(axes: Any, rows: list[dict[str, Any]], name: str, color: str, label: str, linestyle: str = "-") -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    axes.plot(
        [p[0] for p in points], [p[1] for p in points], color=color, label=label, linestyle=linestyle, linewidth=1.6
    )
