"""The command line: `rlsys train | warmstart | eval | report | dashboard | doctor | export | lab`."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rlsys.cli_dashboard import dashboard
from rlsys.cli_lab import app as lab
from rlsys.cli_report import report
from rlsys.config import RunConfig, load_config
from rlsys.errors import RlsysError

app = typer.Typer(
    help="Asynchronous RL for language models, with staleness and importance correction visible and measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(lab, name="lab")
app.command(epilog="Example: rlsys report runs/quickstart")(report)
app.command(epilog="Example: rlsys dashboard quickstart")(dashboard)
out = Console()
err = Console(stderr=True)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.FIELD=VALUE]...", help="Changes to it, e.g. rollout.workers=2.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]


def main() -> None:
    """Entry point: deliberate errors print their message and exit with 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    try:
        app()
    except RlsysError as error:
        err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        err.print(str(error), markup=False, highlight=False)
        sys.exit(1)


@app.command(epilog="Example: rlsys train configs/quickstart.yaml staleness.max=0 learner.steps=50")
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the configuration; start nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a policy: rollouts, rewards, learner and weight sync on Ray."""
    settings = load_config(config, overrides or ())
    if check:
        _check(settings, as_json)
        return
    from rlsys.control.lifecycle import train as run

    with RunView(settings, quiet=as_json) as view:
        result = run(
            settings, resume=resume, on_status=view.status, on_warmstart=view.warmstart, on_dashboard=view.dashboard
        )
    if as_json:
        _print_json(
            {
                "directory": str(result.directory),
                "checkpoint": str(result.checkpoint),
                "version": result.version,
                "accuracy": {str(version): value for version, value in result.accuracy.items()},
                "ledger": result.ledger,
                "seconds": result.seconds,
                "plot": str(result.plot),
            }
        )
        return
    out.print(
        f"\nHeld-out accuracy [bold]{_number(result.before)} → {_number(result.after)}[/] "
        f"after {result.version} learner steps in {result.seconds:.0f} s."
    )
    out.print("Look further:")
    root = _shown(result.directory)
    for what, where in (
        ("reward and staleness", _shown(result.plot)),
        ("TensorBoard", f"tensorboard --logdir {root}/events"),
        ("the whole run, as a page", f"scripts/run report {root}"),
        ("the same, as it goes on", f"scripts/run dashboard {root}"),
        ("every metric", f"{root}/metrics.jsonl"),
        ("every token", f"{root}/rollouts/"),
        ("check the policy", f"scripts/run eval {_shown(result.checkpoint)} {config}"),
        ("serve it", f"python -m vllm.entrypoints.openai.api_server --model {_shown(result.checkpoint)}"),
    ):
        out.print(f"  {what:<24} {where}", markup=False, highlight=False, soft_wrap=True)


@app.command(epilog="Example: rlsys warmstart configs/quickstart.yaml seed=1")
def warmstart(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Make the tiny model a run starts from (supervised, cached), and print its directory."""
    settings = load_config(config, overrides or ())
    from rlsys.control.lifecycle import initial_model
    from rlsys.control.preflight import check_config

    check_config(settings)
    with RunView(settings, quiet=as_json) as view:
        path = initial_model(settings, view.warmstart)
    if as_json:
        _print_json({"model": path})
    else:
        out.print(_shown(Path(path)), markup=False, highlight=False, soft_wrap=True)


@app.command("eval", epilog="Example: rlsys eval runs/quickstart/checkpoints/step-000110 configs/quickstart.yaml")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face model directory.", show_default=False)],
    config: Annotated[
        Path | None, typer.Argument(help="Whose task to use. Default: the run the checkpoint is in.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Greedy accuracy of a checkpoint on a task's held-out prompts, with the rollout engine."""
    source = config or checkpoint.absolute().parent.parent / "config.yaml"
    settings = load_config(source, overrides or ())
    from rlsys.control.offline import evaluate_checkpoint

    result = evaluate_checkpoint(checkpoint, settings)
    if as_json:
        _print_json({"checkpoint": str(checkpoint), "accuracy": result.accuracy, "prompts": result.prompts})
    else:
        out.print(f"accuracy [bold]{result.accuracy:.4f}[/] on {result.prompts} held-out prompts")


@app.command(epilog="Example: rlsys export runs/quickstart/checkpoints/step-000110 exported/")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of a run.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Directory to make.", show_default=False)],
    dtype: Annotated[str | None, typer.Option(help="Cast parameters: float32, bfloat16 or float16.")] = None,
) -> None:
    """Copy a checkpoint's model without the trainer's state: a plain Hugging Face directory."""
    from rlsys.learning.export import export as write

    write(checkpoint, target, dtype)
    out.print(f"wrote {_shown(target)}", markup=False, highlight=False, soft_wrap=True)


@app.command(epilog="Example: rlsys doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """What is installed and present here, and what would fail."""
    from rlsys.control.doctor import diagnose

    checks = diagnose()
    if as_json:
        _print_json([{"name": c.name, "ok": c.ok, "detail": c.detail, "advice": c.advice} for c in checks])
    else:
        table = Table(box=None, show_header=False, padding=(0, 1))
        marks = {True: "[green]ok[/]", False: "[bold red]fails[/]", None: "[yellow]note[/]"}
        for c in checks:
            table.add_row(marks[c.ok], c.name, c.detail + (f"\n[dim]{c.advice}[/]" if c.advice else ""))
        out.print(table)
    if any(c.ok is False for c in checks):
        raise typer.Exit(1)


class RunView:
    """Live view of a run: the supervised phase as a bar, then one table with both sides of the loop."""

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

    def status(self, status: Any) -> None:
        """A run's status, a `control.service.Status`."""
        if self._train is None:
            self._train = self._bar.add_task("training", total=self._config.learner.steps, note="")
        self._bar.update(self._train, completed=status.version, note=f"[dim]{status.phase}[/]")
        self._live.update(Group(self._bar, self._table(status)) if status.metrics else self._bar)

    def _table(self, status: Any) -> Table:
        m, ledger = status.metrics, status.ledger
        accuracy = "  ".join(f"{v}: {a:.3f}" for v, a in sorted(status.accuracy.items())[-4:])
        table = Table.grid(padding=(0, 2))
        for name, value in (
            ("reward", f"{_number(m.get('reward/mean'))}   held-out by step  {accuracy}"),
            (
                "staleness",
                f"mean {_number(m.get('staleness/mean'), 2)}  max {_number(m.get('staleness/max'), 0)}  "
                f"bound {self._config.staleness.max}   in flight {_number(m.get('staleness/in_flight/mean'), 2)}  "
                f"in queue {_number(m.get('staleness/in_queue/mean'), 2)}",
            ),
            (
                "importance",
                f"ESS token {_number(m.get('importance/ess_token'))}  "
                f"sequence {_number(m.get('importance/ess_sequence'))}  "
                f"clipped {_percent(m.get('importance/clip_fraction'))}",
            ),
            ("KL", f"to reference {_number(m.get('kl/reference_k3'), 4)} nats per token"),
            (
                "tokens/s",
                f"generated {_number(m.get('throughput/generated_tokens_per_s'), 0)}  "
                f"trained {_number(m.get('throughput/trained_tokens_per_s'), 0)}",
            ),
            (
                "weight sync",
                f"learner {status.version}  published {status.published_version}  serving "
                f"{' '.join(f'{n}:{v}' for n, v in sorted(status.serving.items()))}  "
                f"pause {_number(_milliseconds(m.get('weight_sync/pause_s')), 1)} ms",
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


def _check(config: RunConfig, as_json: bool) -> None:
    from rlsys.control.preflight import check_config

    remarks = check_config(config)
    if as_json:
        _print_json({"ok": True, "slots": config.slots, "remarks": remarks})
        return
    out.print(
        f"[green]ok[/] {config.name}: {config.slots} slots keep every trained token within "
        f"staleness.max={config.staleness.max}; the run would write {_shown(config.path)}"
    )
    for remark in remarks:
        out.print(f"  note: {remark}", markup=False, highlight=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _shown(path: Path) -> str:
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _milliseconds(value: float | None) -> float | None:
    return None if value is None else 1000 * value


if __name__ == "__main__":
    main()
