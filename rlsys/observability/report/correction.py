"""The chapters on distance: importance ratios, their split, the gradient audit, KL to the reference."""

from typing import TYPE_CHECKING

from rlsys.observability.catalogue import CATALOGUE, PARTS
from rlsys.observability.report import figures
from rlsys.observability.report.document import (
    Absent,
    Cell,
    Figure,
    Section,
    Table,
    Text,
    named,
    number,
    seconds,
    table,
)
from rlsys.observability.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED
from rlsys.observability.report.pieces import over_steps, panel, section
from rlsys.observability.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

BUCKETS = PARTS["by_staleness"]


def importance(run: RunRecord) -> Section:
    """How far the policy had moved from what sampled its data, and what the correction did about it."""
    if not run.values("importance/k3"):
        return section("Importance", Absent("importance ratios", "no learner step"))
    return section(
        "Importance",
        panel(
            run,
            "ess",
            "Effective sample size",
            "ESS of the raw importance weights as a share of the batch: over tokens, and over whole responses.",
            [
                ("tokens", "importance/ess_token", BLUE),
                ("responses", "importance/ess_sequence", GREEN),
            ],
            ylabel="ESS, share",
            top=1.03,
            smooth=True,
        ),
        _ess_by_staleness(run),
        panel(
            run,
            "fractions",
            "What clipping and correction touch",
            "Share of tokens that are clipped, masked or truncated, and of those beyond the objective's bounds.",
            [
                ("clipped", "importance/clip_fraction", ORANGE),
                ("outside", "importance/outside_fraction", GREY),
                ("masked", "importance/masked_fraction", PURPLE),
                ("truncated", "importance/truncated_fraction", RED),
            ],
            ylabel="share of tokens",
            smooth=True,
        ),
        panel(
            run,
            "gap",
            "Distance and linearization gap",
            "k3 between the policy and what sampled, and the gap between the product of ratios and its linear part.",
            [
                ("k3, nats a token", "importance/k3", BLUE),
                ("linearization gap", "importance/linearization_gap", ORANGE),
            ],
            ylabel="",
            log=True,
        ),
        over_steps(run, [f"importance/log_ratio_{n}" for n in ("p01", "p50", "p99", "abs_max")], beside=True),
        _by_staleness(run),
    )


def _mean_by_staleness(run: RunRecord, name: str) -> list[float | None]:
    return [run.mean(f"{name}/by_staleness/{bucket}") for bucket in BUCKETS]


def _ess_by_staleness(run: RunRecord) -> Figure | Absent:
    token, sequence = (_mean_by_staleness(run, f"importance/ess_{kind}") for kind in ("token", "sequence"))
    if not any(value is not None for value in (*token, *sequence)):
        return Absent("ESS by staleness", "the metrics by staleness are missing")

    def draw(canvas: "Canvas") -> None:
        series = [("tokens", token, BLUE), ("responses", sequence, GREEN)]
        figures.bars(canvas, BUCKETS, series, xlabel="staleness in versions", ylabel="ESS, share", top=1.03)

    about = "Mean over steps of the ESS among tokens, and among responses, of one staleness; no bar: no such data."
    return Figure(name="ess-by-staleness", title="ESS by staleness", about=about, draw=draw)


def _by_staleness(run: RunRecord) -> Table:
    rows: list[tuple[Cell | str, ...]] = []
    for name, metric in CATALOGUE.items():
        if metric.by_staleness and (run.values(name) or any(_mean_by_staleness(run, name))):
            parts = map(number, _mean_by_staleness(run, name))
            rows.append((named(name), number(run.mean(name)), *parts))
    head = " | ".join(["metric", "all", *(f"staleness {bucket}" for bucket in BUCKETS)])
    return table(head, *rows, caption="Mean over the steps with such data; – : none had")


SPLIT = (("drift", ORANGE), ("lag", BLUE), ("engine", RED), ("engine_later_spans", PURPLE))


def split(run: RunRecord) -> Section:
    """The three parts of the log-ratio, where they were probed."""
    title = "Split of the log-ratio"
    if not run.values("split/tokens"):
        fraction = run.setting("probe.fraction")
        why = "probe.fraction is 0" if fraction == 0 else "no step of this run was probed"
        return section(title, Absent("drift, policy lag and engine mismatch", why))
    parts = [(part, color) for part, color in SPLIT if run.values(f"split/{part}/k3")]
    rows: list[tuple[Cell | str, ...]] = [
        (named(f"split/{part}/k3"), *(number(run.mean(f"split/{part}/{kind}")) for kind in ("k3", "abs_mean", "mean")))
        for part, _ in parts
    ]
    return section(
        title,
        Text(
            "log π_θ − log μ = drift within the step + policy lag + engine mismatch, measured by scoring a share of "
            "each batch under the weights that sampled it."
        ),
        panel(
            run,
            "split-k3",
            "k3 of each part",
            "How much of the distance to what sampled is drift within the step, lag, and engine mismatch.",
            [(part.replace("_", " "), f"split/{part}/k3", color) for part, color in parts],
            ylabel="k3, nats a token",
            log=True,
        ),
        panel(
            run,
            "split-abs",
            "Mean absolute log-ratio of each part",
            "Mean absolute value of each part of the log-ratio over probed tokens.",
            [(part.replace("_", " "), f"split/{part}/abs_mean", color) for part, color in parts],
            ylabel="nats",
        ),
        table("part | k3 | mean absolute | mean", *rows, caption="Means over probed steps"),
        Text(
            f"{number(run.total('split/tokens'))} tokens in {len(run.values('split/tokens'))} steps were probed; "
            f"that took {seconds(run.total('split/seconds'))} beside training."
        ),
    )


def audit(run: RunRecord) -> Section:
    """Stale gradients against fresh ones, where they were compared."""
    title = "Gradient audit"
    if not run.values("audit/cosine"):
        why = "audit.every is 0" if not run.setting("audit.every") else "no step of this run was audited"
        return section(title, Absent("the corrected stale gradient against a fresh one", why))
    return section(
        title,
        panel(
            run,
            "audit",
            "Cosine to a fresh gradient",
            "The corrected stale gradient against a fresh one, and two fresh ones against each other.",
            [
                ("stale, fresh", "audit/cosine", BLUE),
                ("fresh, fresh", "audit/cosine_floor", GREY),
            ],
            ylabel="cosine",
            bottom=None,
            markers=["stale, fresh", "fresh, fresh"],
        ),
        panel(
            run,
            "audit-norm",
            "Length against a fresh gradient",
            "Norm of the corrected stale gradient over that of the fresh one.",
            [("stale / fresh", "audit/norm_ratio", ORANGE)],
            ylabel="ratio of norms",
            markers=["stale / fresh"],
            level=1.0,
        ),
        over_steps(run, ["audit/cosine", "audit/cosine_floor", "audit/norm_ratio"]),
    )


def divergence(run: RunRecord) -> Section:
    """Distance to the reference policy."""
    title = "KL to the reference"
    if not run.values("kl/reference_k3"):
        why = "the run had no reference policy" if run.setting("kl.reference") is False else "the metrics are missing"
        return section(title, Absent("KL to the reference", why))
    return section(
        title,
        panel(
            run,
            "kl",
            "KL of a token",
            "Estimate k3 of the distance of the policy to the one it started from.",
            [("k3", "kl/reference_k3", BLUE)],
            ylabel="nats a token",
            log=True,
            smooth=True,
        ),
        panel(
            run,
            "kl-sequence",
            "KL of a response",
            "log π_θ − log π_ref summed over a response, mean over responses.",
            [("response", "kl/sequence_mean", GREEN)],
            ylabel="nats a response",
            bottom=None,
            smooth=True,
        ),
        over_steps(run, ["kl/reference_k1", "kl/reference_k3", "kl/sequence_mean", "kl/coef"]),
    )
