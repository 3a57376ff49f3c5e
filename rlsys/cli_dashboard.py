"""`rlsys dashboard`: run directories as pages in a browser."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from rlsys.cli_view import AsJson, print_json

out = Console(highlight=False, soft_wrap=True)


def dashboard(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Names below runs/, or directories.", show_default=False)
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; anything but loopback demands a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show runs, finished or under way, in a browser; with several also how they compare. Ends with Ctrl-C."""
    from rlsys.dashboard import serve
    from rlsys.dashboard.run import find_run

    def tell(url: str) -> None:
        if as_json:
            print_json({"url": url, "runs": [str(path) for path in directories]})
        else:
            out.print(f"dashboard of {', '.join(path.name for path in directories)}:", markup=False)
            out.print(f"  {url}", markup=False)
        sys.stdout.flush()

    directories = [find_run(name) for name in runs]
    serve(directories, host=host, port=port, on_url=tell)
