"""What a report consists of, before it is HTML or Markdown."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsys.observability.catalogue import definition

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


@dataclass(frozen=True, slots=True)
class Cell:
    """Text of a table; `code`: a name; `note`: small print below it."""

    text: str
    code: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns after the first hold numbers unless `prose`. beside: narrow enough to stand next to a picture."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    prose: bool = False
    beside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture: `name` is its file's stem, `about` what it shows, for those who do not see it and those who do."""

    name: str
    title: str
    about: str
    draw: "Callable[[Canvas], None]"


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Absent:
    """What a run did not record, and why."""

    what: str
    why: str

    @property
    def text(self) -> str:
        """As a sentence."""
        return f"not recorded: {self.what} ({self.why})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A response of the run. Prompt and response are whatever a model wrote."""

    about: str
    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the run, folded."""

    title: str
    text: str


Block = Table | Figure | Text | Absent | Sample | Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A chapter."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return self.title.lower().replace(" ", "-").replace(",", "")


@dataclass(frozen=True, slots=True)
class Card:
    """A number to see first."""

    label: str
    value: str
    note: str = ""
    bad: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A whole report. `name`: stem of its files."""

    name: str
    title: str
    summary: str
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]


def table(
    head: str, *rows: tuple[Cell | str, ...], caption: str = "", prose: bool = False, beside: bool = False
) -> Table:
    """`head` with `|` between the columns."""
    cells = tuple(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row) for row in rows)
    columns = tuple(part.strip() for part in head.split("|"))
    return Table(head=columns, rows=cells, caption=caption, prose=prose, beside=beside)


def named(key: str) -> Cell:
    """A metric's name above its unit and meaning, as the catalogue has them."""
    metric = definition(key)
    unit = "" if metric.unit == "1" else f" [{metric.unit}]"
    return Cell(key, code=True, note=metric.meaning + unit)


def number(value: float | None, digits: int = 4) -> str:
    """Significant digits, whole numbers whole; – for none."""
    if value is None:
        return "–"
    if abs(value) < 1e15 and (float(value).is_integer() or abs(value) >= 10**digits):
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """`12.3%`."""
    return "–" if share is None else f"{100 * share:.1f}%"


def seconds(value: float | None) -> str:
    """`36 s`, `12 min 5 s`, `2 h 31 min`."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(value: float | None) -> str:
    """`3.3 MB`, in powers of 1000."""
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
