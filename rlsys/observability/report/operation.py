"""The chapters on the machinery: throughput, weight sync, the ledger, alarms, notes, responses, files."""

from rlsys.observability.report.document import (
    Absent,
    Block,
    Cell,
    Sample,
    Section,
    Source,
    Text,
    number,
    percent,
    seconds,
    size,
    table,
)
from rlsys.observability.report.facts import paused, share, watched
from rlsys.observability.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE
from rlsys.observability.report.pieces import over_steps, panel, section
from rlsys.observability.report.record import RunRecord

NOTES_SHOWN = 20
"""Notes that are listed one by one."""

TEXT_SHOWN = 600
"""Characters of a prompt or response that are shown."""


def throughput(run: RunRecord) -> Section:
    """Rates, and who waited for whom."""
    if not run.values("throughput/step_s"):
        return section("Throughput", Absent("throughput", "no learner step"))
    computed, waited = share(run, "throughput/learner_s"), share(run, "throughput/learner_idle_s")
    rows = [
        ("learner computed", percent(computed), "throughput/learner_s ÷ throughput/step_s"),
        ("learner waited for a batch", percent(waited), "throughput/learner_idle_s ÷ throughput/step_s"),
        (
            "neither",
            percent(None if computed is None or waited is None else max(0.0, 1 - computed - waited)),
            "handing over, publishing, evaluating, writing checkpoints",
        ),
        ("rollout workers idle", percent(run.mean("throughput/rollout_idle_fraction")), "mean over steps"),
        ("decoding stood still for syncs", percent(paused(run)), "weight_sync/pause_s ÷ workers' time"),
    ]
    return section(
        "Throughput",
        panel(
            run,
            "tokens",
            "Tokens per second",
            "Tokens that the rollout workers finished and tokens that the learner consumed, prompts included.",
            [
                ("generated", "throughput/generated_tokens_per_s", BLUE),
                ("trained", "throughput/trained_tokens_per_s", ORANGE),
            ],
            ylabel="tokens/s",
            smooth=True,
        ),
        panel(
            run,
            "step-time",
            "Time of a step",
            "Wall time of each learner step, and the parts in which the learner computed and waited for a batch.",
            [
                ("step", "throughput/step_s", GREY),
                ("computing", "throughput/learner_s", BLUE),
                ("waiting", "throughput/learner_idle_s", ORANGE),
            ],
            ylabel="s",
            smooth=True,
        ),
        panel(
            run,
            "idle",
            "Idle rollout workers",
            "Share of time in which rollout workers had nothing to decode.",
            [("idle", "throughput/rollout_idle_fraction", GREEN)],
            ylabel="share of time",
            top=1.03,
            smooth=True,
        ),
        table("where the time went | share | how it is counted", *rows, prose=True),
        over_steps(run, ["throughput/generated_tokens_per_s", "throughput/trained_tokens_per_s", "throughput/step_s"]),
        _workers(run),
    )


def _workers(run: RunRecord) -> Text | Absent:
    """Workers asked for and there, and how often one was started again."""
    asked, ready = run.last("workers/rollout/desired"), run.values("workers/rollout/ready")
    if asked is None or not ready:
        return Absent("rollout workers over time", "the metrics are missing")
    restarts = run.count("workers/rollout/restarts")
    again = "" if restarts is None else f"; {number(restarts)} were started again"
    return Text(
        f"Rollout workers: {number(asked)} asked for, at least {number(min(ready))} ready at every step{again}."
    )


def weight_sync(run: RunRecord) -> Section:
    """How new versions reached the workers."""
    if not run.values("weight_sync/bytes"):
        return section("Weight sync", Absent("weight sync", "no learner step"))
    stops = run.total("weight_sync/pause_s")
    versions = len(run.values("weight_sync/bytes"))
    return section(
        "Weight sync",
        panel(
            run,
            "sync",
            "Time of a sync",
            "Packing a version, from sending to its acknowledgement, and decoding standing still for it.",
            [
                ("pack", "weight_sync/publish_s", PURPLE),
                ("send to acknowledge", "weight_sync/apply_s", BLUE),
                ("decoding paused", "weight_sync/pause_s", ORANGE),
            ],
            ylabel="s",
            log=True,
        ),
        panel(
            run,
            "lag",
            "Serving behind the learner",
            "Learner version less the version that the slowest worker serves, when the step was written down.",
            [("slowest worker", "weight_sync/serving_lag_max", GREY)],
            ylabel="versions",
        ),
        Text(
            f"{versions} versions of {size(run.last('weight_sync/bytes'))} each. Decoding stood still for "
            f"{seconds(stops)} in all, {percent(paused(run))} of the workers' time."
        ),
        over_steps(
            run,
            [f"weight_sync/{n}" for n in ("publish_s", "apply_s", "pause_s", "bytes", "acked", "serving_lag_max")],
        ),
    )


def ledger(run: RunRecord) -> Section:
    """How every prompt ended."""
    if not run.ends:
        return section("Ledger", Absent("how prompts ended", "ledger.jsonl is empty or missing"))
    ended, total = run.ended, run.ended.total()
    rows = []
    for end, count in ended.most_common():
        of = [row for row in run.ends if row["end"] == end]
        open_for = sum(row["version"] - row["admitted_version"] for row in of) / len(of)
        again = sum(row.get("attempts", 1) > 1 for row in of)
        rows.append((Cell(end, code=True), str(count), percent(count / total), number(open_for), str(again)))
    lost = run.largest("ledger/lost")
    if lost is None:
        said: Block = Absent("lost groups", "no learner step")
    elif lost:
        said = Text(f"{number(lost)} groups were lost: admitted, without an end and not open. That is a defect.")
    else:
        said = Text("Lost: 0. At every step each admitted group was open or had a named end.")
    return section(
        "Ledger",
        table("end | groups | share | versions from admission to end, mean | more than one attempt", *rows),
        said,
    )


def alarms(run: RunRecord) -> Section:
    """Alarms with cause and advice, then everything else a person should read."""
    rows = [
        (
            Cell(alarm.name, code=True, note=alarm.severity),
            number(alarm.raised),
            "stands" if alarm.cleared is None else number(alarm.cleared),
            number(alarm.value),
            number(alarm.limit),
            Cell(alarm.cause or alarm.message, note=alarm.advice),
        )
        for alarm in run.alarms
    ]
    said: Block
    if rows:
        said = table(
            "alarm | raised at step | cleared | value | limit | likely cause, and what to change", *rows, prose=True
        )
    elif watched(run):
        said = Text("No alarm was raised.")
    else:
        said = Absent("alarms", "the run watched for none")
    return section("Alarms and notes", said, *_notes(run))


def _notes(run: RunRecord) -> list[Block]:
    if not run.notes:
        return [Text("No other notes.")]
    rows = [
        (Cell(str(note.get("kind", "")), code=True), cut(str(note.get("message", "")), TEXT_SHOWN))
        for note in run.notes[:NOTES_SHOWN]
    ]
    rest = len(run.notes) - len(rows)
    more = f"{rest} more in events.jsonl" if rest else ""
    return [table("note | message", *rows, caption=more, prose=True)]


def responses(run: RunRecord) -> Section:
    """A few responses of the first and the last recorded step."""
    if not run.samples:
        why = "records.rollouts_every is 0" if run.setting("records.rollouts_every") == 0 else "no rollouts/ files"
        return section("Responses", Absent("responses", why))
    blocks: list[Block] = []
    for row in run.samples:
        ages = sorted({row["step"] - 1 - version for version in row["versions"]})
        span = "–" if not ages else f"{ages[0]}" if len(ages) == 1 else f"{ages[0]} to {ages[-1]}"
        blocks.append(
            Sample(
                about=f"step {row['step']} · reward {number(row['reward'])} · advantage "
                f"{number(row['advantage'], 3)} · {len(row['versions'])} tokens, {span} versions old · "
                f"{row['finish_reason']}",
                prompt=cut(row["prompt_text"], TEXT_SHOWN),
                response=cut(row["response_text"], TEXT_SHOWN),
            )
        )
    chosen = Text("Best and worst response to two prompts of the first and of the last recorded step.")
    return section("Responses", chosen, *blocks)


def files(run: RunRecord) -> Section:
    """The configuration as it was resolved."""
    if not run.config_text:
        return section("Configuration", Absent("the configuration", "config.yaml is missing"))
    return section("Configuration", Source("config.yaml", run.config_text.strip()))


def cut(text: str, most: int) -> str:
    """The beginning of a long text."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most} more characters)"
