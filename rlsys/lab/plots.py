"""The look of the lab's pictures; matplotlib is imported only when one is drawn."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.lab.estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, GREY, FAINT = "#1f2933", "#8a8f98", "#d8dce2"
BLUE, ORANGE, GREEN, RED, PURPLE = "#2f6fde", "#d9772b", "#2d9d6c", "#c8403a", "#7a51b8"
SCALE = ("#b9d0f7", "#7fa8ee", "#2f6fde", "#1f4fa8", "#132f66")
"""One hue, light to dark, for an ordered series such as T."""

STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.titlesize": 12,
    "svg.hashsalt": "rlsys",
}


def save(draw: Callable[["Figure"], None], path: Path, title: str, size: tuple[float, float] = (9.0, 3.8)) -> Path:
    """Draw on a fresh figure with a title on top and write it as PNG."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                _label_logarithms(axis)
        figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def panels(figure: "Figure", columns: int, **options: Any) -> list["Axes"]:
    """Axes side by side."""
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return list(axes[0])


def with_intervals(
    axes: "Axes", x: Sequence[float], estimates: Sequence[Estimate], style: str = "o-", **options: Any
) -> None:
    """Estimates as points (and a line), with their intervals as bars."""
    margins = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
    axes.errorbar(x, [e.value for e in estimates], margins, fmt=style, **options)


def _label_logarithms(axis: "Axis") -> None:
    """Plain numbers at 1, 2, 5 on a short logarithmic axis, powers of ten on a long one, nothing in between."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not isinstance(axis.get_major_locator(), LogLocator):  # linear, or ticks chosen by hand
        return
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    axis.set_minor_formatter(NullFormatter())
    if decades < 4:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
