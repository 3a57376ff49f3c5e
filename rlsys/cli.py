"""The command line: every command in the order of its help, and those that train and look at checkpoints."""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from rlsys import cli_cluster as cluster
from rlsys import cli_local as local
from rlsys.cli_dashboard import dashboard
from rlsys.cli_lab import app as lab
from rlsys.cli_report import report
from rlsys.cli_view import AsJson, RunView, err, number, out, print_json, shown
from rlsys.config import RunConfig, load_config
from rlsys.errors import RlsysError

app = typer.Typer(
    help="Asynchronous RL for language models, with staleness and importance correction visible and measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.FIELD=VALUE]...", help="Changes to it, e.g. rollout.workers=2.", show_default=False
    ),
]


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

    # Ray says on stdout that a worker died, though it is replaced; with --json only the result is to be there.
    with RunView(settings, quiet=as_json) as view, contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        result = run(
            settings, resume=resume, on_status=view.status, on_warmstart=view.warmstart, on_dashboard=view.dashboard
        )
    if as_json:
        print_json(
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
        f"\nHeld-out accuracy [bold]{number(result.before)} → {number(result.after)}[/] "
        f"after {result.version} learner steps in {result.seconds:.0f} s."
    )
    out.print("Look further:")
    root = shown(result.directory)
    for what, where in (
        ("reward and staleness", shown(result.plot)),
        ("TensorBoard", f"tensorboard --logdir {root}/events"),
        ("the whole run, as a page", f"scripts/run report {root}"),
        ("the same, as it goes on", f"scripts/run dashboard {root}"),
        ("every metric", f"{root}/metrics.jsonl"),
        ("every token", f"{root}/rollouts/"),
        ("check the policy", f"scripts/run eval {shown(result.checkpoint)}"),
        ("serve it", f"python -m vllm.entrypoints.openai.api_server --model {shown(result.checkpoint)}"),
    ):
        out.print(f"  {what:<24} {where}", markup=False, highlight=False, soft_wrap=True)


def warmstart(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Make the tiny model a run starts from (supervised, cached), and print its directory."""
    settings = load_config(config, overrides or ())
    from rlsys.control.lifecycle import initial_model
    from rlsys.control.preflight import check_config

    check_config(settings)
    with RunView(settings, quiet=as_json) as view:
        path = initial_model(settings, view.warmstart)
    if as_json:
        print_json({"model": path})
    else:
        out.print(shown(Path(path)), markup=False, highlight=False, soft_wrap=True)


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
        print_json({"checkpoint": str(checkpoint), "accuracy": result.accuracy, "prompts": result.prompts})
    else:
        out.print(f"accuracy [bold]{result.accuracy:.4f}[/] on {result.prompts} held-out prompts")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of a run.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Directory to make.", show_default=False)],
    dtype: Annotated[str | None, typer.Option(help="Cast parameters: float32, bfloat16 or float16.")] = None,
) -> None:
    """Copy a checkpoint's model without the trainer's state: a plain Hugging Face directory."""
    from rlsys.learning.export import export as write

    write(checkpoint, target, dtype)
    out.print(f"wrote {shown(target)}", markup=False, highlight=False, soft_wrap=True)


def doctor(as_json: AsJson = False) -> None:
    """What is installed and present here, and what would fail."""
    from rlsys.control.doctor import diagnose

    checks = diagnose()
    if as_json:
        print_json([{"name": c.name, "ok": c.ok, "detail": c.detail, "advice": c.advice} for c in checks])
    else:
        table = Table(box=None, show_header=False, padding=(0, 1))
        marks = {True: "[green]ok[/]", False: "[bold red]fails[/]", None: "[yellow]note[/]"}
        for c in checks:
            table.add_row(marks[c.ok], c.name, c.detail + (f"\n[dim]{c.advice}[/]" if c.advice else ""))
        out.print(table)
    if any(c.ok is False for c in checks):
        raise typer.Exit(1)


def _check(config: RunConfig, as_json: bool) -> None:
    from rlsys.control.preflight import check_config

    remarks = check_config(config)
    if as_json:
        print_json({"ok": True, "slots": config.slots, "remarks": remarks})
        return
    out.print(
        f"[green]ok[/] {config.name}: {config.slots} slots keep every trained token within "
        f"staleness.max={config.staleness.max}; the run would write {shown(config.path)}"
    )
    for remark in remarks:
        out.print(f"  note: {remark}", markup=False, highlight=False, soft_wrap=True)


HERE, CLUSTER, LOOK = "Train", "On a Ray cluster", "Look at runs"
COMMANDS = (
    (HERE, "train", train, "rlsys train configs/quickstart.yaml staleness.max=0 learner.steps=50"),
    (HERE, "warmstart", warmstart, "rlsys warmstart configs/quickstart.yaml seed=1"),
    (HERE, "doctor", doctor, "rlsys doctor --json"),
    (CLUSTER, "up", local.up, "rlsys up --cpus 4"),
    (CLUSTER, "submit", cluster.submit, "rlsys submit configs/quickstart.yaml rollout.workers=2 --follow"),
    (CLUSTER, "status", cluster.status, "rlsys status quickstart"),
    (CLUSTER, "logs", cluster.logs, "rlsys logs quickstart --follow"),
    (CLUSTER, "scale", cluster.scale, "rlsys scale quickstart --rollout 3 --wait"),
    (CLUSTER, "stop", cluster.stop, "rlsys stop quickstart"),
    (CLUSTER, "down", local.down, "rlsys down"),
    (LOOK, "dashboard", dashboard, "rlsys dashboard quickstart"),
    (LOOK, "report", report, "rlsys report runs/quickstart"),
    (LOOK, "eval", evaluate, "rlsys eval runs/quickstart/checkpoints/step-000120"),
    (LOOK, "export", export, "rlsys export runs/quickstart/checkpoints/step-000120 exported/"),
)
for panel, name, command, example in COMMANDS:
    app.command(name, epilog=f"Example: {example}", rich_help_panel=panel)(command)
app.add_typer(lab, name="lab", rich_help_panel=LOOK)


if __name__ == "__main__":
    main()
