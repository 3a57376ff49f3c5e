"""`rlsys report`: runs read back from their files as one page, in HTML and in Markdown.

record   reads a run's directory
facts    the numbers a run comes to
outcome, staleness, correction, operation   the chapters on one run
compare  several runs side by side
figures, render   pictures and pages
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsys.observability.report.compare import comparison
from rlsys.observability.report.facts import facts
from rlsys.observability.report.record import find_run, labels, read_run
from rlsys.observability.report.render import write
from rlsys.observability.report.single import single, summary

__all__ = ["Report", "write_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Where a report was written, and its numbers. facts: run → number by name, None where it was not recorded."""

    html: Path
    markdown: Path
    summaries: dict[str, str]
    facts: dict[str, dict[str, float | None]]


def write_report(names: Sequence[str | Path], out: str | Path | None = None) -> Report:
    """Write the report on one run, or the comparison of several, into `out`; by default into the first run's directory.

    A name is one below `runs/` or a directory. Raises DataError where there is no run, or a damaged file.
    """
    paths = [find_run(name) for name in names]
    runs = [read_run(path, label) for path, label in zip(paths, labels(paths), strict=True)]
    document = single(runs[0]) if len(runs) == 1 else comparison(runs)
    written = write(document, paths[0] if out is None else Path(out))
    return Report(
        html=written["html"],
        markdown=written["markdown"],
        summaries={run.label: summary(run) for run in runs},
        facts={run.label: facts(run) for run in runs},
    )
