"""The chapters on what a run was and what it came to."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rlsys.observability.report import figures
from rlsys.observability.report.document import Absent, Figure, Section, Text, number, seconds, table
from rlsys.observability.report.facts import accuracy, best_step, shown, tenth, wall
from rlsys.observability.report.figures import BLUE, ORANGE, PURPLE
from rlsys.observability.report.pieces import over_steps, panel, section
from rlsys.observability.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


def what_it_was(run: RunRecord) -> Section:
    """The configuration in one table."""
    if not run.config:
        return section("What it was", Absent("the configuration", "config.yaml is missing"))
    get = run.setting
    tiny = get("model.tiny") or {}
    made = f"tiny, warm-started: {described(tiny)}"
    done = run.steps[-1]["step"] if run.steps else 0
    objective = {key: value for key, value in (get("objective") or {}).items() if key != "correction"}
    rows = (
        ("started", started(run)),
        ("task", described(get("task"))),
        ("model", get("model.path") or made),
        ("numerics", f"learner {get('model.dtype')}, engine {get('rollout.dtype')}"),
        ("objective", described(objective)),
        ("correction", described(get("objective.correction"))),
        ("advantage", described(get("advantage"))),
        ("KL to the reference", described(get("kl"), head="estimator")),
        ("staleness", f"at most {described(get('staleness'), head='max')}"),
        (
            "batch",
            f"{get('rollout.prompts_per_step')} prompts × {get('rollout.samples_per_prompt')} responses of at most "
            f"{get('rollout.max_new_tokens')} tokens, temperature {get('rollout.temperature')}, "
            f"{get('rollout.workers')} rollout worker(s)",
        ),
        (
            "optimizer",
            f"lr {get('learner.lr')}, {get('learner.schedule')}, gradients clipped at {get('learner.grad_clip')}",
        ),
        ("seed", str(get("seed"))),
        ("learner steps", f"{done} of {get('learner.steps')}"),
    )
    return section("What it was", table("setting | value", *rows, prose=True))


def started(run: RunRecord) -> str:
    """When the first record was written."""
    times = [row["time"] for row in (*run.steps, *run.evaluations) if "time" in row]
    return f"{datetime.fromtimestamp(min(times), UTC):%Y-%m-%d %H:%M} UTC" if times else "–"


def described(values: Mapping[str, Any] | None, head: str = "name") -> str:
    """`ppo_clip: reduce token_mean, clip_low 0.2`; the value of `head` first, fields that are null left out."""
    if not isinstance(values, Mapping):
        return "–"
    rest = ", ".join(
        f"{key} {_value(value)}"
        for key, value in values.items()
        if key != head and value is not None and not isinstance(value, Mapping)
    )
    first = _value(values.get(head, ""))
    return f"{first}: {rest}" if first and rest else first or rest


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def outcome(run: RunRecord) -> Section:
    """Accuracy, reward, time."""
    prompts = run.last("eval/prompts")
    rows = [
        ("held-out accuracy, first", number(accuracy(run, "first")), _at(run.series("eval/accuracy")[:1])),
        ("held-out accuracy, last", number(accuracy(run, "last")), _at(run.series("eval/accuracy")[-1:])),
        ("held-out accuracy, best", number(accuracy(run, "best")), f"step {number(best_step(run))}"),
    ]
    if not run.evaluations:
        rows = []
    for label, last in (("first", False), ("last", True)):
        if run.steps:
            value = number(tenth(run, "reward/mean", last=last))
            rows.append((f"mean reward, {label} tenth of the steps", value, "of the training batches"))
    rows.append(("wall time", seconds(wall(run)), "from the first record to the last"))
    rows.append(("wall time of the learner steps", shown(run, "train_s"), "sum of throughput/step_s"))
    why = "the run did not come to an evaluation"
    return section(
        "Outcome",
        _reward_and_accuracy(run) if run.steps else None,
        panel(
            run,
            "entropy",
            "Entropy of the policy",
            "Mean entropy of the next-token distribution at trained tokens.",
            [("entropy", "policy/entropy", PURPLE)],
            ylabel="nats",
            smooth=True,
        ),
        panel(
            run,
            "no-signal",
            "Groups without a signal",
            "Share of groups whose responses all got the same reward.",
            [("equal rewards", "advantage/zero_variance_fraction", ORANGE)],
            ylabel="share of groups",
            top=1.03,
            smooth=True,
        ),
        table("outcome | value | where", *rows, prose=True),
        Absent("held-out accuracy", why) if not run.evaluations else Text(_prompts(prompts)),
        Absent("learner steps", "metrics.jsonl has none") if not run.steps else None,
        over_steps(
            run,
            [
                "reward/mean",
                "reward/pass_rate",
                "advantage/zero_variance_fraction",
                "policy/entropy",
                "policy/grad_norm",
                "policy/response_tokens",
            ],
        ),
    )


def _prompts(prompts: float | None) -> str:
    text = f"Accuracy is the mean reward of one greedy response to each of {number(prompts)} held-out prompts"
    if not prompts:
        return text + "."
    error = 0.5 / prompts**0.5
    return (
        f"{text}. With rewards from 0 to 1 its standard error is at most ±{error:.2g}: other prompts, another number."
    )


def _at(point: Sequence[tuple[int, float]]) -> str:
    return f"step {point[0][0]}" if point else ""


def _reward_and_accuracy(run: RunRecord) -> Figure:
    series = [
        ("reward of the batch", run.series("reward/mean"), BLUE),
        ("held-out, greedy", run.series("eval/accuracy"), ORANGE),
    ]

    def draw(canvas: "Canvas") -> None:
        present = [one for one in series if one[1]]
        figures.lines(canvas, present, ylabel="reward", bottom=None, smooth=True, markers=["held-out, greedy"])

    about = "Mean reward of each training batch, faint, its running mean, and the greedy held-out accuracy."
    return Figure(name="reward", title="Reward and held-out accuracy", about=about, draw=draw)
