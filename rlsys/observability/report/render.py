"""A document as one HTML file that needs no other, and as Markdown with its pictures beside it.

Whatever a model, a reward or a configuration wrote is text here, never markup: the HTML template escapes by itself,
and Markdown goes through `plain`.
"""

import re
from collections.abc import Mapping
from functools import singledispatch
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlsys.observability.report import document as doc
from rlsys.observability.report import figures

PICTURES = "{name}-figures"
"""Directory of the Markdown's pictures, beside it."""


def write(document: doc.Document, directory: Path) -> dict[str, Path]:
    """Write `NAME.html`, `NAME.md` and `NAME-figures/*.png`; returns the first two by format."""
    folder = directory / PICTURES.format(name=document.name)
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, str] = {}
    for section in document.sections:
        for block in section.blocks:
            if isinstance(block, doc.Figure):
                png, drawn[block.name] = figures.pictures(block.name, block.draw)
                (folder / f"{block.name}.png").write_bytes(png)
    paths = {"html": directory / f"{document.name}.html", "markdown": directory / f"{document.name}.md"}
    paths["html"].write_text(to_html(document, drawn), "utf-8")
    paths["markdown"].write_text(to_markdown(document), "utf-8")
    return paths


def to_html(document: doc.Document, drawn: Mapping[str, str]) -> str:
    """The page. drawn: SVG by the name of its figure."""
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.tests["a"] = lambda block, kind: type(block).__name__ == kind
    # The only text that is not escaped: SVG that matplotlib made, which escapes labels itself.
    pictures = {name: Markup(svg) for name, svg in drawn.items()}
    return jinja.get_template("page.html").render(document=document, pictures=pictures)


def to_markdown(document: doc.Document) -> str:
    """The same chapters and tables."""
    parts = [f"# {plain(document.title)}", plain(document.summary)]
    if document.cards:
        rows = tuple((doc.Cell(c.label), doc.Cell(c.value), doc.Cell(c.note)) for c in document.cards)
        parts.append(_markdown(doc.Table(head=("", "", ""), rows=rows, prose=True), document.name))
    for section in document.sections:
        parts.append(f"## {section.title}")
        parts += [_markdown(block, document.name) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Text that Markdown and the HTML in it leave as it is, on one line."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|#!~$])", r"\\\1", text)
    return " ".join(text.split("\n")).replace("\r", " ")


@singledispatch
def _markdown(block: object, name: str) -> str:
    """One block; `name` is the document's."""
    raise TypeError(block)


@_markdown.register
def _(block: doc.Text, name: str) -> str:
    return plain(block.text)


@_markdown.register
def _(block: doc.Absent, name: str) -> str:
    return f"*{plain(block.text)}*"


@_markdown.register
def _(block: doc.Figure, name: str) -> str:
    where = f"{PICTURES.format(name=name)}/{block.name}.png"
    return f"**{plain(block.title)}.** {plain(block.about)}\n\n![{plain(block.title)}]({where})"


@_markdown.register
def _(block: doc.Table, name: str) -> str:
    numbers = "---" if block.prose else "---:"
    lines = [[plain(head) for head in block.head], ["---", *[numbers] * (len(block.head) - 1)]]
    lines += [[_cell(cell) for cell in row] for row in block.rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\n{plain(block.caption)}" if block.caption else text


@_markdown.register
def _(block: doc.Sample, name: str) -> str:
    return f"{plain(block.about)}\n\n{_fenced(block.prompt)}\n\n{_fenced(block.response)}"


@_markdown.register
def _(block: doc.Source, name: str) -> str:
    return f"<details><summary>{plain(block.title)}</summary>\n\n{_fenced(block.text, 'yaml')}\n\n</details>"


def _cell(cell: doc.Cell) -> str:
    text = f"<code>{plain(cell.text)}</code>" if cell.code else plain(cell.text)
    return f"{text}<br><sub>{plain(cell.note)}</sub>" if cell.note else text


def _fenced(text: str, language: str = "text") -> str:
    """Between fences longer than any inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
