"""The two pictures of a study: bias and spread against staleness, and direction against staleness."""

from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from rlsys.lab import plots
from rlsys.lab.study import StudyResult, StudyRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "reinforce": plots.GREY,
    "is_token": plots.ORANGE,
    "is_sequence": plots.BLUE,
    "is_sequence_truncated": "#6aa5e8",
    "is_token_truncated": "#e3a877",
    "ppo_clip": plots.RED,
    "decoupled_ppo": "#b06a1d",
    "cispo": "#c9a227",
    "aipo": "#8c7a1f",
    "gspo": plots.PURPLE,
    "raft": plots.GREEN,
}
TITLES = {"none": "no correction"}

Curve = Callable[[StudyRow], float]


def draw_study(result: StudyResult, directory: Path, name: str = "study") -> list[Path]:
    """Write `{name}-bias-variance.png` and `{name}-cosine.png`; the number of responses is the middle one."""
    n = sorted(result.settings.samples)[len(result.settings.samples) // 2]
    width = 1.0 + 3.1 * len(result.settings.corrections)
    return [
        plots.save(
            lambda figure: _draw(
                figure,
                result,
                n,
                (
                    ("bias, of ‖∇J‖", lambda row: row.measures["bias"].value),
                    (f"spread of {n} responses, of ‖∇J‖", lambda row: row.measures["variance"].value ** 0.5),
                ),
            ),
            directory / f"{name}-bias-variance.png",
            "Bias and spread of the gradient estimate, by the age of the data",
            (width, 7.2),
        ),
        plots.save(
            lambda figure: _draw(
                figure,
                result,
                n,
                (
                    ("cosine to ∇J, infinitely many responses", lambda row: row.measures["cosine"].value),
                    (f"cosine to ∇J, {n} responses", lambda row: row.measures["batch_cosine"].value),
                ),
            ),
            directory / f"{name}-cosine.png",
            "Direction of the gradient estimate, by the age of the data",
            (width, 7.2),
        ),
    ]


def _draw(figure: "Figure", result: StudyResult, n: int, rows: tuple[tuple[str, Curve], ...]) -> None:
    """A row of panels per measure, a column per correction; objectives that coincide in all of them share a line."""
    corrections = result.settings.corrections
    grid = figure.subplots(len(rows), len(corrections), squeeze=False, sharex=True, sharey="row")
    for column, correction in enumerate(corrections):
        for names in _coinciding(result, correction, n, [curve for _, curve in rows]):
            for axes, (_, curve) in zip(grid[:, column], rows, strict=True):
                _line(axes, result, names, correction, n, curve)
        grid[0, column].set_title(TITLES.get(correction, correction))
        grid[-1, column].set_xlabel("steps since the data")
        grid[-1, column].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=7.5)
    for axes, (label, _) in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(label)


def _line(axes: "Axes", result: StudyResult, names: list[str], correction: str, n: int, curve: Curve) -> None:
    ages = result.settings.staleness
    values = [curve(result.row(names[0], correction, k, n)) for k in ages]
    label = fill(" = ".join(names), 34, break_long_words=False)
    axes.plot(range(len(ages)), values, "o-", markersize=4, color=COLORS[names[0]], label=label)
    axes.set_xticks(range(len(ages)), [str(k) for k in ages])


def _coinciding(result: StudyResult, correction: str, n: int, curves: list[Curve]) -> list[list[str]]:
    """Objectives of a correction, grouped where all curves are the same to four digits."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for objective, other in result.settings.estimators:
        if other == correction:
            rows = [result.row(objective, correction, k, n) for k in result.settings.staleness]
            key = tuple(f"{curve(row):.4f}" for row in rows for curve in curves)
            groups.setdefault(key, []).append(objective)
    return list(groups.values())
