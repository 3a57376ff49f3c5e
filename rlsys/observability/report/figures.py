"""The pictures of a report: small panels that stand beside or below one another.

A picture is drawn once and kept as PNG (for Markdown) or as SVG inside the page. There its colours become variables of
the page, which has two sets of them, its text stays text, and names of parts carry the picture's own, so that
several pictures in one page do not mix.
"""

import io
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

INK, GREY, FAINT = "#1f2933", "#8a8f98", "#d8dce2"
BLUE, ORANGE, GREEN, RED, PURPLE = "#2f6fde", "#d9772b", "#2d9d6c", "#c8403a", "#7a51b8"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, "#8c7a1f", "#1f8fa8", "#b0568c")
AGES = ("#a9c4f0", "#6f9be6", "#2f6fdd", "#1f4fa8", "#132f66")
"""One hue, light to dark, for staleness 0, 1, 2, 3 and more."""

COLORS = {
    INK: "ink",
    GREY: "grey",
    FAINT: "faint",
    **{color: f"series-{i}" for i, color in enumerate(SERIES)},
    **{color: f"age-{i}" for i, color in enumerate(AGES)},
}
"""Colour → variable of the page."""

WIDTH, HEIGHT = 4.7, 2.75
"""Inches. At 72 points each, a panel fills a telephone's width at its own size."""

POINTS = 400
"""Most points of a line; longer series are averaged in equal parts."""

STYLE: Any = {
    "font.size": 9.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "rlsys",
    "svg.fonttype": "none",
}

Points = Sequence[tuple[float, float]]


def pictures(name: str, draw: "Callable[[Canvas], None]") -> tuple[bytes, str]:
    """The picture as PNG on white, and as an `<svg>` element for a page."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    png, svg = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(STYLE):  # the canvases themselves, because savefig draws everything twice
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=150, layout="constrained", facecolor="white")
        raster: Any = FigureCanvasAgg(figure)
        draw(figure)
        raster.print_png(png, metadata={"Software": None})
        figure.set_layout_engine("none")  # it stands where it was put
        figure.set_facecolor("none")
        vector: Any = FigureCanvasSVG(figure)
        vector.print_svg(svg, metadata={"Date": None, "Creator": None})
    return png.getvalue(), inline(name, svg.getvalue().decode("utf-8"))


def inline(name: str, text: str) -> str:
    """matplotlib's SVG as an element: no prolog, no metadata, nothing that names another place."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' (?:height|width)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    for color, variable in COLORS.items():
        text = text.replace(color, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", text).strip()


# -- what a panel may hold --------------------------------------------------------------------------------------------


def lines(
    canvas: "Canvas",
    series: Sequence[tuple[str, Points, str]],
    *,
    ylabel: str,
    bottom: float | None = 0.0,
    top: float | None = None,
    log: bool = False,
    smooth: bool = False,
    markers: Sequence[str] = (),
    dashed: Sequence[str] = (),
    level: float | None = None,
) -> None:
    """Lines over learner steps: (label, points, colour). smooth: faint, with a running mean on top."""
    axes = canvas.subplots()
    for label, points, color in series:
        many = smooth and len(points) >= SMOOTH_FROM
        x, y = _thinned(points)
        style: dict[str, Any] = {"marker": "o", "markersize": 3.5} if label in markers or len(x) == 1 else {}
        style |= {"linestyle": "--"} if label in dashed else {}
        if many:
            axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
            y = _running_mean(y, window(len(y)))
        axes.plot(x, y, color=color, label=label, **style)
    if level is not None:
        axes.axhline(level, color=GREY, linewidth=0.8)
    axes.set(xlabel="learner step", ylabel=ylabel)
    if log and any(value > 0 for _, points, _ in series for _, value in points):
        axes.set_yscale("log", nonpositive="mask")
        _plain_logarithms(axes)
    else:
        axes.set_ylim(bottom=bottom, top=top)
    _legend(canvas, axes)


SMOOTH_FROM = 40
"""Points from which on a running mean is drawn."""


def window(points: int) -> int:
    """Points in a running mean."""
    return max(5, points // 20)


def bars(
    canvas: "Canvas",
    places: Sequence[str],
    series: Sequence[tuple[str, Sequence[float | None], str]],
    *,
    xlabel: str,
    ylabel: str,
    top: float | None = None,
) -> None:
    """Groups of bars; a missing value is an empty place."""
    axes = canvas.subplots()
    width = 0.8 / len(series)
    for i, (label, values, color) in enumerate(series):
        at = [place + (i - (len(series) - 1) / 2) * width for place, value in enumerate(values) if value is not None]
        axes.bar(at, [value for value in values if value is not None], width * 0.92, color=color, label=label)
    axes.set_xticks(range(len(places)), list(places))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.set_ylim(bottom=0, top=top)
    axes.grid(visible=False, axis="x")
    if len(series) > 1:
        _legend(canvas, axes)


def layers(
    canvas: "Canvas", steps: Sequence[int], shares: Sequence[tuple[str, Sequence[float], str]], *, ylabel: str
) -> None:
    """Shares that sum to 1, one upon the other."""
    axes = canvas.subplots()
    axes.stackplot(
        steps, *(values for _, values, _ in shares), labels=[s[0] for s in shares], colors=[s[2] for s in shares]
    )
    axes.set(xlabel="learner step", ylabel=ylabel, ylim=(0, 1))
    if len(steps) > 1:
        axes.set_xlim(steps[0], steps[-1])
    _legend(canvas, axes)


def _legend(canvas: "Canvas", axes: "Axes") -> None:
    handles, names = axes.get_legend_handles_labels()
    if names:
        columns = 2 if sum(map(len, names)) > 34 else len(names)
        canvas.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=1.3, columnspacing=1.2)


def _plain_logarithms(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _thinned(points: Points) -> tuple[list[float], list[float]]:
    """At most POINTS points: means of equal parts."""
    if len(points) <= POINTS:
        return [x for x, _ in points], [y for _, y in points]
    edges = [round(i * len(points) / POINTS) for i in range(POINTS + 1)]
    parts = [points[a:b] for a, b in pairwise(edges)]
    return [sum(x for x, _ in p) / len(p) for p in parts], [sum(y for _, y in p) / len(p) for p in parts]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Centred; narrower at the ends."""
    half = width // 2
    near = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in near]
