"""The report on one run."""

from rlsys.observability.report.correction import audit, divergence, importance, split
from rlsys.observability.report.document import Card, Document, number, seconds
from rlsys.observability.report.facts import facts
from rlsys.observability.report.operation import alarms, files, ledger, responses, throughput, weight_sync
from rlsys.observability.report.outcome import outcome, what_it_was
from rlsys.observability.report.record import RunRecord
from rlsys.observability.report.staleness import staleness


def single(run: RunRecord) -> Document:
    """All chapters, the outcome first."""
    chapters = (
        outcome,
        what_it_was,
        staleness,
        importance,
        split,
        audit,
        divergence,
        throughput,
        weight_sync,
        ledger,
        alarms,
        responses,
        files,
    )
    return Document(
        name="report",
        title=run.label,
        summary=summary(run),
        cards=cards(run),
        sections=tuple(chapter(run) for chapter in chapters),
    )


def summary(run: RunRecord) -> str:
    """The run in a few sentences."""
    if not run.steps:
        return "This run has not done a learner step."
    found = facts(run)
    steps = f"{number(found['steps'])} learner steps, {seconds(found['wall_s'])} from the first record to the last."
    parts = [steps]
    if found["accuracy_first"] is not None:
        parts.append(
            f"Held-out accuracy went from {number(found['accuracy_first'], 3)} to {number(found['accuracy_last'], 3)}."
        )
    if found["staleness_mean"] is not None:
        bound = found["staleness_bound"]
        parts.append(
            f"Trained tokens were {number(found['staleness_mean'], 3)} versions old on average and "
            f"{number(found['staleness_max'])} at most"
            + (
                "."
                if bound is None
                else f", within the bound of {number(bound)}."
                if _held(found)
                else f", beyond the bound of {number(bound)}."
            )
        )
    if found["alarms"]:
        parts.append(f"Alarms raised: {number(found['alarms'])}; still standing: {number(found['alarms_standing'])}.")
    return " ".join(parts)


def cards(run: RunRecord) -> tuple[Card, ...]:
    """The numbers on top; only those that were recorded."""
    found = facts(run)
    first, last, best = (found[f"accuracy_{which}"] for which in ("first", "last", "best"))
    mean, oldest, bound = (found[f"staleness_{which}"] for which in ("mean", "max", "bound"))
    made = [
        Card("held-out accuracy", f"{number(first, 3)} → {number(last, 3)}", f"best {number(best, 3)}"),
        Card(
            "staleness, versions",
            f"{number(mean, 3)}",
            f"oldest {number(oldest)}, bound {number(bound)}",
            bad=not _held(found),
        ),
        Card("ESS over responses", number(found["ess_sequence"], 3), f"over tokens {number(found['ess_token'], 3)}"),
        Card(
            "groups lost",
            number(found["groups_lost"]),
            f"{number(found['groups_trained'])} trained, {number(found['groups_rejected'])} rejected or failed",
            bad=bool(found["groups_lost"]),
        ),
        Card("alarms", number(found["alarms"]), f"{number(found['alarms_standing'])} stand", bad=bool(found["alarms"])),
        Card("wall time", seconds(found["wall_s"]), f"{number(found['trained'], 3)} trained tokens/s"),
    ]
    there = (last, mean, found["ess_sequence"], found["groups_lost"], found["alarms"], found["wall_s"])
    return tuple(card for card, value in zip(made, there, strict=True) if value is not None)


def _held(found: dict[str, float | None]) -> bool:
    """Whether no trained token was beyond the bound, as counted and as the oldest says."""
    oldest, bound = found["staleness_max"], found["staleness_bound"]
    return not found["staleness_violations"] and (oldest is None or bound is None or oldest <= bound)
