"""The chapter on how old the trained tokens were: against the bound, where the age came from, what was rejected."""

from typing import TYPE_CHECKING

from rlsys.observability.catalogue import CATALOGUE, PARTS
from rlsys.observability.report import figures
from rlsys.observability.report.document import (
    Absent,
    Block,
    Figure,
    Section,
    Table,
    Text,
    named,
    number,
    percent,
    table,
)
from rlsys.observability.report.figures import AGES, BLUE, GREEN, GREY, ORANGE, RED
from rlsys.observability.report.pieces import over_steps, panel, section
from rlsys.observability.report.record import Ages, RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

BUCKETS = PARTS["by_staleness"]


def staleness(run: RunRecord) -> Section:
    """Ages against their bound, where they came from, and what was rejected."""
    if not run.values("staleness/mean"):
        return section("Staleness", Absent("staleness", "no learner step"))
    flight, queue = run.mean("staleness/in_flight/mean"), run.mean("staleness/in_queue/mean")
    split = None
    if flight is not None and queue is not None and flight + queue > 0:
        split = Text(
            f"Of the mean age, {percent(flight / (flight + queue))} was gained in flight, until the response finished, "
            f"and {percent(queue / (flight + queue))} in the queue, until the learner took it."
        )
    return section(
        "Staleness",
        panel(
            run,
            "staleness",
            "Age of trained tokens",
            "Versions between sampling and training: mean, 95th percentile, oldest token and the configured bound.",
            [
                ("mean", "staleness/mean", BLUE),
                ("95%", "staleness/p95", GREEN),
                ("oldest", "staleness/max", GREY),
                ("bound", "staleness/bound", RED),
            ],
            ylabel="versions",
            dashed=["bound"],
        ),
        panel(
            run,
            "staleness-parts",
            "Where the age came from",
            "The mean age, split at the moment the response finished.",
            [
                ("in flight", "staleness/in_flight/mean", GREEN),
                ("in the queue", "staleness/in_queue/mean", ORANGE),
            ],
            ylabel="versions",
            smooth=True,
        ),
        *_histogram(run),
        split,
        over_steps(run, [name for name in CATALOGUE if name.startswith("staleness/") and "rejected" not in name]),
        _rejected(run),
    )


def _rejected(run: RunRecord) -> Table | Absent | Text:
    """As the ledger counts them, where there is one."""
    groups = run.count("staleness/rejected_groups")
    if run.ends:
        groups = float(run.ended["rejected_stale"] + run.ended["rejected_nonfinite"])
    if groups is None:
        return Absent("what was rejected for age", "the metric is missing")
    if groups == 0:
        return Text("No group was rejected for age or for a step that was not finite.")
    values = {"rejected_groups": groups, "rejected_tokens": run.count("staleness/rejected_tokens")}
    for what, counter in (("rejected", "staleness/rejected_groups"), ("trained", "ledger/trained")):
        for name in (f"{what}_length", f"{what}_reward"):
            values[name] = run.pooled(f"staleness/{name}", counter)
    rows = [(named(f"staleness/{name}"), number(value)) for name, value in values.items()]
    return table("rejected against trained | since the start", *rows)


def _histogram(run: RunRecord) -> list[Block]:
    ages = run.ages
    if ages is None or not sum(ages.total):
        every = run.setting("records.rollouts_every")
        why = "records.rollouts_every is 0" if every == 0 else "the run left no rollouts/step-*.parquet"
        return [Absent("the ages of single tokens", why)]
    total, all_tokens = ages.total, sum(ages.total)
    files = f"{ages.files[0]} of {ages.files[1]} recorded steps"
    rows = [(str(age), str(count), percent(count / all_tokens)) for age, count in enumerate(total)]

    def draw(canvas: "Canvas") -> None:
        shares = [count / all_tokens for count in total]
        names = [str(age) for age in range(len(total))]
        figures.bars(canvas, names, [("", shares, BLUE)], xlabel="age in versions", ylabel="share of tokens")

    return [
        Figure(name="ages", title="Trained tokens by age", about=f"Share of trained tokens, {files}.", draw=draw),
        _ages_over_steps(ages),
        table("age in versions | tokens | share", *rows, caption=f"Trained tokens by age, {files}", beside=True),
    ]


def _ages_over_steps(ages: Ages) -> Figure:
    steps = sorted(ages.by_step)
    shares: list[tuple[str, list[float], str]] = []
    for i, bucket in enumerate(BUCKETS):
        counts = [ages.by_step[step][i:] if bucket.endswith("+") else ages.by_step[step][i : i + 1] for step in steps]
        values = [sum(c) / max(1, sum(ages.by_step[step])) for c, step in zip(counts, steps, strict=True)]
        if any(values):
            shares.append((bucket, values, AGES[i]))

    def draw(canvas: "Canvas") -> None:
        figures.layers(canvas, steps, shares, ylabel="share of tokens")

    about = "Share of each step's trained tokens by age in versions."
    return Figure(name="ages-over-steps", title="Ages over the run", about=about, draw=draw)
