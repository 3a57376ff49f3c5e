"""What the command line shows of a run: its progress while it goes on, numbers, paths, JSON."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rlsys.config import RunConfig

out = Console()
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]
"""The option that every command with something to tell has; `print_json` is what it asks for."""

LINE_S = 10.0
"""Between two lines of progress where there is no terminal to draw on."""


class RunView:
    """Live view of a run: the supervised phase as a bar, then one table with both sides of the loop.

    Without a terminal, as in the log of a job, it is a line every ten seconds.
    """

    def __init__(self, config: RunConfig, *, quiet: bool) -> None:
        self._config = config
        self._quiet = quiet
        self._bar = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=out,
        )
        self._warm: Any = None
        self._train: Any = None
        self._next_line = 0.0
        self._live = Live(self._bar, console=out, refresh_per_second=4, transient=False)

    def __enter__(self) -> "RunView":
        if not self._quiet:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._quiet:
            self._live.stop()

    def dashboard(self, url: str) -> None:
        """Where the dashboard answers; on standard error where standard output is for programs."""
        (err if self._quiet else out).print(f"dashboard: {url}", markup=False, highlight=False, soft_wrap=True)

    def warmstart(self, step: int, steps: int, loss: float) -> None:
        """Progress of the supervised phase."""
        if self._warm is None:
            self._warm = self._bar.add_task("warm start", total=steps, note="")
        self._bar.update(self._warm, completed=step, note=f"loss {loss:.3f}")
        self._line(f"warm start {step}/{steps}  loss {loss:.3f}")

    def status(self, status: Any) -> None:
        """A run's status, a `control.service.Status`."""
        if self._train is None:
            self._train = self._bar.add_task("training", total=self._config.learner.steps, note="")
        self._bar.update(self._train, completed=status.version, note=f"[dim]{status.phase}[/]")
        self._live.update(Group(self._bar, run_table(status, self._config)) if status.metrics else self._bar)
        steps, m = self._config.learner.steps, status.metrics
        self._line(
            f"{status.phase}  step {status.version}/{steps}  reward {number(m.get('reward/mean'))}  "
            f"staleness {number(m.get('staleness/mean'), 2)}  ESS {number(m.get('importance/ess_sequence'))}"
        )

    def _line(self, text: str) -> None:
        now = time.monotonic()
        if self._quiet or out.is_terminal or now < self._next_line:
            return
        self._next_line = now + LINE_S
        out.print(text, markup=False, highlight=False, soft_wrap=True)


def run_table(status: Any, config: RunConfig) -> Table:
    """Both sides of the loop at one moment; `status` is a `control.service.Status`."""
    m, ledger = status.metrics, status.ledger
    accuracy = "  ".join(f"{v}: {a:.3f}" for v, a in sorted(status.accuracy.items())[-4:])
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("reward", f"{number(m.get('reward/mean'))}   held-out by step  {accuracy}"),
        (
            "staleness",
            f"mean {number(m.get('staleness/mean'), 2)}  max {number(m.get('staleness/max'), 0)}  "
            f"bound {config.staleness.max}   in flight {number(m.get('staleness/in_flight/mean'), 2)}  "
            f"in queue {number(m.get('staleness/in_queue/mean'), 2)}",
        ),
        (
            "importance",
            f"ESS token {number(m.get('importance/ess_token'))}  "
            f"sequence {number(m.get('importance/ess_sequence'))}  "
            f"clipped {percent(m.get('importance/clip_fraction'))}",
        ),
        ("KL", f"to reference {number(m.get('kl/reference_k3'), 4)} nats per token"),
        (
            "tokens/s",
            f"generated {number(m.get('throughput/generated_tokens_per_s'), 0)}  "
            f"trained {number(m.get('throughput/trained_tokens_per_s'), 0)}",
        ),
        (
            "weight sync",
            f"learner {status.version}  published {status.published_version}  serving "
            f"{' '.join(f'{n}:{v}' for n, v in sorted(status.serving.items()))}  "
            f"pause {number(milliseconds(m.get('weight_sync/pause_s')), 1)} ms",
        ),
        (
            "groups",
            "  ".join(
                f"{name} {ledger.get(name, 0)}"
                for name in ("waiting", "in_flight", "finished", "learning", "trained", "lost")
            ),
        ),
    ):
        table.add_row(f"[bold]{name}[/]", value)
    return table


def say(text: str) -> None:
    """A line as it is, on standard output."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """A line beside what was asked for, on standard error."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """For programs, on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def shown(path: Path) -> str:
    """A path as short as it can be from here."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def number(value: float | None, digits: int = 3) -> str:
    """A dash for what was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share, in percent."""
    return "–" if value is None else f"{100 * value:.1f}%"


def milliseconds(value: float | None) -> float | None:
    """Of seconds."""
    return None if value is None else 1000 * value
