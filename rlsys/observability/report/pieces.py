"""What every chapter is made of: a panel of metrics over steps, a table of them, a section of what is there."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlsys.observability.report import figures
from rlsys.observability.report.document import Block, Cell, Figure, Section, Table, named, number, table
from rlsys.observability.report.facts import tenth
from rlsys.observability.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


def panel(
    run: RunRecord, name: str, title: str, about: str, curves: Sequence[tuple[str, str, str]], **options: Any
) -> Figure | None:
    """Metrics over steps, (label, metric, colour) each; None where the run has none of them."""
    series = [(label, run.series(metric), color) for label, metric, color in curves]
    series = [one for one in series if one[1]]
    if not series:
        return None

    def draw(canvas: "Canvas") -> None:
        figures.lines(canvas, series, **options)

    return Figure(name=name, title=title, about=about, draw=draw)


def over_steps(run: RunRecord, names: Sequence[str], *, beside: bool = False) -> Table | None:
    """Metrics by their mean, first and last tenth, least and greatest; those the run has."""
    rows: list[tuple[Cell | str, ...]] = []
    for name in names:
        if values := run.values(name):
            ends = (tenth(run, name, last=last) for last in (False, True))
            numbers = (sum(values) / len(values), *ends, min(values), max(values))
            rows.append((named(name), *map(number, numbers)))
    head = "metric | mean over steps | first tenth | last tenth | least | greatest"
    return table(head, *rows, beside=beside) if rows else None


def section(title: str, *blocks: Block | None) -> Section:
    """Of the blocks that are there."""
    return Section(title=title, blocks=tuple(block for block in blocks if block is not None))
