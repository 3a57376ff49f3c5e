"""`rlsys lab study | claims | docs | gradient`: what objectives and corrections do to a gradient.

The first three answer exactly, from enumerable policies; the last one measures on a run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from rlsys.cli_view import AsJson, print_json
from rlsys.errors import ConfigError

if TYPE_CHECKING:
    from rlsys.control.gradient import GradientReport
    from rlsys.lab.report import ClaimReport, Json
    from rlsys.lab.study import StudyResult, StudySettings

NO_GRADIENT = (
    "no gradient to compare, since in no group the rewards differ. Earlier checkpoints have one: checkpoint.every and "
    "checkpoint.keep say how many a run leaves, audit.every compares while it trains"
)

app = typer.Typer(
    help="Bias, variance and claims, measured on policies small enough to enumerate; and a run's own gradients.",
    no_args_is_help=True,
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True)

OutDirectory = Annotated[
    Path | None, typer.Option("--out", help="Directory for JSON, Markdown and pictures.", show_default=False)
]
CLAIM_TASKS = 24


@app.callback()
def one_core() -> None:
    """The tensors are small: more threads than one only wait for each other."""
    import torch

    torch.set_num_threads(1)


@app.command(epilog="Example: rlsys lab study --staleness 0,4,16 --objectives ppo_clip,is_sequence --out lab/")
def study(
    vocabulary: Annotated[int, typer.Option(help="Tokens to choose from, at most 6.")] = 4,
    length: Annotated[int, typer.Option(help="Longest response, at most 6.")] = 6,
    ends: Annotated[bool, typer.Option("--ends", help="Token 0 ends a response.")] = False,
    staleness: Annotated[str, typer.Option(help="Learner steps between the data and the policy.")] = "0,1,4,16",
    objectives: Annotated[str, typer.Option(help="Names, or all.")] = "all",
    corrections: Annotated[str, typer.Option(help="Names, or all.")] = "all",
    samples: Annotated[str, typer.Option(help="Responses per gradient estimate.")] = "16,64,256",
    inner_steps: Annotated[int, typer.Option(help="Further updates on one batch.")] = 0,
    drift: Annotated[str, typer.Option(help="learner: real steps; aimless: a random direction.")] = "learner",
    tasks: Annotated[int, typer.Option(help="Random tasks to average over.")] = 8,
    seed: Annotated[int, typer.Option(help="Of tasks and samples.")] = 0,
    as_json: AsJson = False,
    out_dir: OutDirectory = None,
) -> None:
    """Objective × correction × staleness: bias, variance, MSE and cosine to the exact gradient of expected reward."""
    from rlsys.algo.corrections import CORRECTIONS
    from rlsys.algo.objectives import OBJECTIVES
    from rlsys.lab.report import study_to_json
    from rlsys.lab.study import StudySettings

    settings = StudySettings(
        vocabulary=vocabulary,
        length=length,
        ends=ends,
        staleness=_numbers("staleness", staleness),
        objectives=tuple(OBJECTIVES) if objectives == "all" else _names(objectives),
        corrections=tuple(CORRECTIONS) if corrections == "all" else _names(corrections),
        samples=_numbers("samples", samples),
        inner_steps=inner_steps,
        drift=drift,
        tasks=tasks,
        seed=seed,
    )
    result = _study(settings)
    if out_dir is not None:
        _write_study(result, out_dir)
    if as_json:
        print_json(study_to_json(result))
        return
    _print_study(result)
    if out_dir is not None:
        out.print(f"wrote {out_dir}/study.json, study.md and two pictures", markup=False)


@app.command(epilog="Example: rlsys lab claims --only 3,5 --out lab/")
def claims(
    only: Annotated[str, typer.Option(help="Numbers of claims.")] = "all",
    tasks: Annotated[int, typer.Option(min=8, help="Random problems behind each interval.")] = CLAIM_TASKS,
    as_json: AsJson = False,
    out_dir: OutDirectory = None,
) -> None:
    """Reproduce the papers' claims: predicted, measured with interval, pass or fail. Exits with 1 if one fails."""
    from rlsys.lab.claims import CLAIMS
    from rlsys.lab.report import claims_to_json

    numbers = tuple(CLAIMS) if only == "all" else _numbers("only", only)
    unknown = [number for number in numbers if number not in CLAIMS]
    if unknown:
        raise ConfigError(f"lab claims: only={unknown}: claims have the numbers 1 to {max(CLAIMS)}")
    reports = _claims(numbers, tasks, out_dir, set(numbers), quiet=as_json)
    if out_dir is not None:
        _write_claims(reports, out_dir)
    if as_json:
        print_json(claims_to_json(reports))
    else:
        failed = [report.number for report in reports if not report.passed]
        seconds = sum(report.seconds for report in reports)
        verdict = f"[bold red]{len(failed)} fail[/]: {failed}" if failed else "[green]all pass[/]"
        out.print(f"\n{len(reports)} claims, {verdict}, {seconds:.0f} s of one core")
    if not all(report.passed for report in reports):
        raise typer.Exit(1)


@app.command(epilog="Example: rlsys lab docs --render-only")
def docs(
    directory: Annotated[Path, typer.Option("--out", help="Where the pages are.")] = Path("docs"),
    render_only: Annotated[
        bool, typer.Option("--render-only", help="Measure nothing: write the page from the results already there.")
    ] = False,
) -> None:
    """Measure, and write docs/choosing-an-objective.md from a template, with its tables and pictures."""
    from rlsys.lab.claims import CLAIMS
    from rlsys.lab.page import ASSETS, STUDIES, pictured_claims, write_page

    if not render_only:
        for name, settings in STUDIES.items():
            _write_study(_study(settings), directory / ASSETS, name, pictures=name == "study")
        reports = _claims(tuple(CLAIMS), CLAIM_TASKS, directory / ASSETS, pictured_claims(directory))
        _write_claims(reports, directory / ASSETS)
    out.print(f"wrote {write_page(directory)}", markup=False)


@app.command(epilog="Example: rlsys lab gradient runs/quickstart --prompts 32")
def gradient(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.", show_default=False)],
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="Only checkpoints/step-N, and the batch trained from it.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Groups of each batch. Default: the run's audit.prompts.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=2, help="Fresh responses a prompt, twice. Default: as many as the run sampled, as a fair floor needs."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Stale, corrected gradients of a finished run against fresh on-policy ones; writes RUN/gradient.png.

    For every checkpoint whose next batch was recorded. A cosine near its floor: noise hides what staleness cost, if
    anything. Below it: a loss of direction. kept: how much of the on-policy gradient is in the stale one, noise
    taken out.
    """
    from rlsys.control.gradient import audit_run

    with _progress() as (progress, task):
        report = audit_run(
            run,
            version=step,
            prompts=prompts,
            samples=samples,
            on_step=lambda done, of: progress.update(task, completed=done / of, description="gradient"),
        )
    if as_json:
        print_json(_gradient_to_json(report))
        return
    table = Table(box=None, title="gradient of the batch against two fresh ones, at V", title_justify="left")
    for name in ("V", "staleness", "groups", "cosine", "floor", "norm ratio", "kept"):
        table.add_column(name, justify="right")
    for one in report.steps:
        r = one.result
        values = (r.cosine, r.cosine_floor, r.norm_ratio, r.kept)
        table.add_row(str(one.version), f"{one.staleness:.2f}", str(one.groups), *map(_three_digits, values))
    out.print(table)
    if any(one.result.cosine is None for one in report.steps):
        out.print(f"–: {NO_GRADIENT}")
    out.print(f"kept, all together: {_three_digits(report.kept)}; {report.samples} fresh samples a prompt, twice")
    out.print(f"wrote {report.plot}", markup=False)


def _gradient_to_json(report: "GradientReport") -> "Json":
    rows: list[Json] = [
        {
            "version": one.version,
            "staleness": one.staleness,
            "groups": one.groups,
            "cosine": one.result.cosine,
            "cosine_floor": one.result.cosine_floor,
            "norm_ratio": one.result.norm_ratio,
            "kept": one.result.kept,
        }
        for one in report.steps
    ]
    return {"samples": report.samples, "steps": rows, "kept": report.kept, "plot": str(report.plot)}


def _three_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _study(settings: "StudySettings") -> "StudyResult":
    from rlsys.lab.study import run_study

    with _progress() as (progress, task):
        return run_study(settings, lambda share: progress.update(task, completed=share, description="study"))


def _claims(
    numbers: tuple[int, ...], tasks: int, out_dir: Path | None, pictured: set[int], *, quiet: bool = False
) -> list["ClaimReport"]:
    from rlsys.lab.claims import CLAIMS
    from rlsys.lab.report import run_claim

    reports = []
    with _progress() as (progress, task):
        for done, number in enumerate(numbers):
            progress.update(task, completed=done / len(numbers), description=f"claim {number}")
            reports.append(run_claim(CLAIMS[number], tasks, out_dir if number in pictured else None))
            if not quiet:
                _print_claim(reports[-1])
    return reports


def _write_study(result: "StudyResult", directory: Path, name: str = "study", *, pictures: bool = True) -> None:
    from rlsys.lab.pictures import draw_study
    from rlsys.lab.report import study_from_json, study_to_json, study_to_markdown, to_text

    data = study_to_json(result)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(to_text(data), "utf-8")
    (directory / f"{name}.md").write_text(study_to_markdown(study_from_json(data)), "utf-8")
    if pictures:
        draw_study(result, directory, name)


def _write_claims(reports: list["ClaimReport"], directory: Path) -> None:
    from rlsys.lab.report import claims_from_json, claims_to_json, claims_to_markdown, to_text

    data = claims_to_json(reports)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "claims.json").write_text(to_text(data), "utf-8")
    (directory / "claims.md").write_text(claims_to_markdown(claims_from_json(data)) + "\n", "utf-8")


def _print_claim(report: "ClaimReport") -> None:
    from rlsys.lab.report import shown

    mark = "[green]pass[/]" if report.passed else "[bold red]FAIL[/]"
    out.print(f"\n[bold]{report.number:2d}[/] {mark} [bold]{escape(report.statement)}[/] [dim]({report.source})[/]")
    for check in report.checks:
        sign = "[green]✓[/]" if check.passed else "[bold red]✗[/]"
        exact = "" if check.measured.interval else " [dim]exact[/]"
        numbers = f"predicted {check.predicted}, measured [bold]{shown(check.measured)}[/]{exact}"
        out.print(f"   {sign} {escape(check.quantity)}: {numbers}")
    for note in report.notes:
        out.print(f"     [dim]{escape(note)}[/]")


def _print_study(result: "StudyResult") -> None:
    from rlsys.lab.report import middle_samples

    n = middle_samples(result)
    columns = Table(
        box=None,
        title=f"bias · cosine of the mean · cosine of {n} responses, by learner steps since the data",
        title_justify="left",
    )
    for name in ("objective", "correction", *(str(k) for k in result.settings.staleness)):
        columns.add_column(name)
    for objective, correction in result.settings.estimators:
        cells = []
        for k in result.settings.staleness:
            found = result.row(objective, correction, k, n).measures
            cells.append(
                f"{found['bias'].value:.2f} · {found['cosine'].value:5.2f} · {found['batch_cosine'].value:5.2f}"
            )
        columns.add_row(objective, correction, *cells)
    out.print(columns)


@contextmanager
def _progress() -> Iterator[tuple[Progress, TaskID]]:
    """A bar on standard error, so that standard output stays what was asked for."""
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=err, transient=True)
    with bar:
        yield bar, bar.add_task("", total=1.0)


def _numbers(field: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"lab: {field}={text!r}: whole numbers with commas between them, such as 0,1,4") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))
