"""`rlsys report`: a run, or several side by side, as a page to send to somebody."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from rlsys.cli_view import AsJson, print_json

out = Console(highlight=False, soft_wrap=True)


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="A name below runs/, or a run's directory; two or more are compared.",
            show_default=False,
        ),
    ],
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Where to write. Default: the first run's directory.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what a run did as one HTML page and as Markdown; of several runs, what differs and what came of it."""
    from rlsys.observability.report import write_report

    written = write_report(runs, out_dir)
    if as_json:
        paths = {"html": str(written.html), "markdown": str(written.markdown)}
        print_json({**paths, "runs": written.facts})
        return
    for label, summary in written.summaries.items():
        out.print(Text(label, style="bold"))
        out.print(f"  {summary}", markup=False)
    out.print(f"wrote {written.html} and {written.markdown}", markup=False)
