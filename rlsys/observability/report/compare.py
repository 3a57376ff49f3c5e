"""Several runs side by side: what differs in their configurations, what they came to, curves on one pair of axes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlsys.observability.catalogue import definition
from rlsys.observability.report import figures
from rlsys.observability.report.document import Absent, Block, Cell, Document, Figure, Table, Text, table
from rlsys.observability.report.facts import FACTS
from rlsys.observability.report.figures import SERIES
from rlsys.observability.report.pieces import section
from rlsys.observability.report.record import RunRecord
from rlsys.observability.trackers import flatten

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

IDENTITY = ("name", "run_dir")
"""Fields that say where a run is kept, not what it was."""

CURVES = {
    "outcome": ("eval/accuracy", "reward/mean", "policy/entropy"),
    "staleness": ("staleness/mean", "staleness/max", "staleness/in_flight/mean"),
    "importance": (
        "importance/ess_token",
        "importance/ess_sequence",
        "importance/clip_fraction",
        "importance/k3",
        "kl/reference_k3",
        "audit/cosine",
    ),
    "system": ("throughput/generated_tokens_per_s", "throughput/trained_tokens_per_s", "throughput/learner_idle_s"),
}

LOGARITHMIC = {"importance/k3", "kl/reference_k3"}
SHARES = {"importance/ess_token", "importance/ess_sequence"}


def comparison(runs: Sequence[RunRecord]) -> Document:
    """The report on two or more runs; the order of their colours is the order given."""
    labels = [run.label for run in runs]
    where = table("run | directory", *((Cell(run.label), Cell(str(run.root), code=True)) for run in runs), prose=True)
    titles = {"outcome": "Outcome", "staleness": "Staleness", "importance": "Importance", "system": "System"}
    return Document(
        name="comparison",
        title=" against ".join(labels),
        summary=f"{len(runs)} runs. Means are over each run's own learner steps.",
        cards=(),
        sections=(
            section("What differs", where, differences(runs)),
            *(section(title, *_overlays(runs, CURVES[group]), _facts(runs, group)) for group, title in titles.items()),
            section("Ledger", _ends(runs)),
            section("Alarms", *_alarms(runs)),
        ),
    )


def differences(runs: Sequence[RunRecord]) -> Block:
    """The fields of the configurations in which the runs are not all the same."""
    without = [run.label for run in runs if not run.config]
    if without:
        return Absent("differences of configuration", f"{', '.join(without)} has no config.yaml")
    flat = [dict(flatten(run.config)) for run in runs]
    fields = [field for field in dict.fromkeys(name for one in flat for name in one) if field not in IDENTITY]
    rows: list[tuple[Cell | str, ...]] = [
        (Cell(field, code=True), *(one.get(field, "–") for one in flat))
        for field in fields
        if len({one.get(field) for one in flat}) > 1
    ]
    if not rows:
        return Text("The configurations are the same, field by field.")
    same = f"{len(fields) - len(rows)} other fields are the same; – : no such field"
    return table(" | ".join(["field", *_columns(runs)]), *rows, caption=same, prose=True)


def _columns(runs: Sequence[RunRecord]) -> list[str]:
    return [run.label.replace("|", "/") for run in runs]


def _facts(runs: Sequence[RunRecord], group: str) -> Table:
    rows: list[tuple[Cell | str, ...]] = []
    for fact in FACTS:
        if fact.group == group:
            values = [fact.compute(run) for run in runs]
            if any(value is not None for value in values):
                rows.append((fact.label, *map(fact.show, values)))
    return table(" | ".join(["", *_columns(runs)]), *rows, caption="– : not recorded")


def _overlays(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Block]:
    """A panel for each metric that any of the runs recorded."""
    found: list[Block] = []
    for name in names:
        series = [
            (run.label, run.series(name), SERIES[i % len(SERIES)]) for i, run in enumerate(runs) if run.values(name)
        ]
        if not series:
            continue
        metric = definition(name)
        missing = [run.label for run in runs if not run.values(name)]
        about = metric.meaning + (f"; not recorded: {', '.join(missing)}" if missing else "")
        found.append(
            Figure(name=name.replace("/", "-"), title=name, about=about, draw=_overlay(series, name, metric.unit))
        )
    return found


def _overlay(series: Sequence[tuple[str, list[tuple[int, float]], str]], name: str, unit: str) -> Any:
    few = [label for label, _, _ in series] if name.startswith(("eval/", "audit/")) else []

    def draw(canvas: "Canvas") -> None:
        figures.lines(
            canvas,
            series,
            ylabel="" if unit == "1" else unit,
            bottom=None if name.startswith(("eval/", "reward/", "audit/")) else 0.0,
            top=1.03 if name in SHARES else None,
            log=name in LOGARITHMIC,
            smooth=not name.endswith("/max"),
            markers=few,
        )

    return draw


def _ends(runs: Sequence[RunRecord]) -> Block:
    ends = sorted({end for run in runs for end in run.ended})
    if not ends:
        return Absent("how prompts ended", "no run has a ledger.jsonl")
    rows: list[tuple[Cell | str, ...]] = [
        (Cell(end, code=True), *(str(run.ended[end]) if run.ends else "–" for run in runs)) for end in ends
    ]
    return table(" | ".join(["groups", *_columns(runs)]), *rows, caption="– : not recorded")


def _alarms(runs: Sequence[RunRecord]) -> list[Block]:
    names = sorted({alarm.name for run in runs for alarm in run.alarms})
    if not names:
        return [Text("None of these runs has a record of an alarm.")]
    rows: list[tuple[Cell | str, ...]] = [
        (Cell(name, code=True), *(_when(run, name) for run in runs)) for name in names
    ]
    return [table(" | ".join(["raised at steps", *_columns(runs)]), *rows, prose=True)]


def _when(run: RunRecord, name: str) -> str:
    found = [f"{a.raised} to {'the end' if a.cleared is None else a.cleared}" for a in run.alarms if a.name == name]
    return ", ".join(found) or "–"
