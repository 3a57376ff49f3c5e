"""Results of the lab as JSON and Markdown. The JSON is the record: everything else is written from it.

    study   {"schema": 1, "settings": {...}, "distance": [one a staleness], "rows": [one an estimator, age and size]}
    claims  {"schema": 1, "passed": bool, "claims": [one a claim]}

An estimate is [value, low, high] with the ends of its 99% interval, or [value] where exact. Numbers keep 5 digits.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlsys.errors import DataError
from rlsys.lab import plots
from rlsys.lab.claims.outcome import SOURCES, Check, Claim
from rlsys.lab.estimate import Estimate
from rlsys.lab.study import DISTANCES, MEASURES, StudyResult, StudyRow, StudySettings

SCHEMA = 1

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimReport:
    """What became of a claim. seconds: of processor time. plot: file name, None where none was drawn."""

    number: int
    statement: str
    source: str
    predicted: str
    passed: bool
    seconds: float
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    plot: str | None


def run_claim(claim: Claim, tasks: int, out: Path | None = None) -> ClaimReport:
    """Measure a claim and draw it into `out`, as `claim-05.png`."""
    begun = time.process_time()
    outcome = claim.measure(tasks)
    seconds = time.process_time() - begun
    plot = None
    if out is not None:
        plot = plots.save(
            outcome.draw, out / f"claim-{claim.number:02d}.png", f"{claim.number}. {claim.statement}"
        ).name
    return ClaimReport(
        number=claim.number,
        statement=claim.statement,
        source=claim.source,
        predicted=claim.predicted,
        passed=outcome.passed,
        seconds=seconds,
        checks=outcome.checks,
        notes=outcome.notes,
        plot=plot,
    )


def claims_to_json(reports: Sequence[ClaimReport]) -> Json:
    return {
        "schema": SCHEMA,
        "passed": all(report.passed for report in reports),
        "claims": [
            {
                **{name: getattr(report, name) for name in ("number", "statement", "source", "predicted", "passed")},
                "seconds": round(report.seconds, 2),
                "checks": [
                    {
                        "quantity": check.quantity,
                        "predicted": check.predicted,
                        "measured": _pack(check.measured),
                        "passed": check.passed,
                    }
                    for check in report.checks
                ],
                "notes": list(report.notes),
                "plot": report.plot,
            }
            for report in reports
        ],
    }


def claims_from_json(data: Json) -> list[ClaimReport]:
    """Raises DataError on another schema."""
    _require_schema(data)
    return [
        ClaimReport(
            **{
                **entry,
                "checks": tuple(
                    Check(**{**check, "measured": _unpack(check["measured"])}) for check in entry["checks"]
                ),
                "notes": tuple(entry["notes"]),
            }
        )
        for entry in data["claims"]
    ]


def study_to_json(result: StudyResult) -> Json:
    return {
        "schema": SCHEMA,
        "settings": {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(result.settings).items()
        },
        "distance": [
            {"staleness": k, **{name: _pack(found[name]) for name in DISTANCES}} for k, found in result.distance.items()
        ],
        "rows": [
            {
                **{
                    name: getattr(row, name)
                    for name in ("objective", "correction", "staleness", "samples", "enumerated")
                },
                **{name: _pack(row.measures[name]) for name in MEASURES},
            }
            for row in result.rows
        ],
    }


def study_from_json(data: Json) -> StudyResult:
    """Raises DataError on another schema."""
    _require_schema(data)
    settings: Json = {name: tuple(v) if isinstance(v, list) else v for name, v in data["settings"].items()}
    return StudyResult(
        settings=StudySettings(**settings),
        rows=tuple(
            StudyRow(
                **{name: row[name] for name in ("objective", "correction", "staleness", "samples", "enumerated")},
                measures={name: _unpack(row[name]) for name in MEASURES},
            )
            for row in data["rows"]
        ),
        distance={found["staleness"]: {name: _unpack(found[name]) for name in DISTANCES} for found in data["distance"]},
    )


def to_text(data: Json) -> str:
    """JSON with one element of a list a line, so that versions of a result can be compared."""

    def value(item: Any) -> str:
        if isinstance(item, list) and item and isinstance(item[0], dict):
            return "[\n" + ",\n".join("  " + json.dumps(one, ensure_ascii=False) for one in item) + "\n ]"
        return json.dumps(item, ensure_ascii=False)

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {value(item)}" for key, item in data.items()) + "\n}\n"


def read(path: Path) -> Json:
    """Raises DataError where there is no such result."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as problem:
        raise DataError(f"{path}: no result of the lab: {problem}") from problem


def claims_to_markdown(reports: Sequence[ClaimReport]) -> str:
    """One row a check; the claim's own cells only in its first."""
    rows = []
    for report in reports:
        for i, check in enumerate(report.checks):
            own = (str(report.number), report.statement, report.source) if i == 0 else ("", "", "")
            passed = "pass" if check.passed else "**FAIL**"
            rows.append((*own, check.quantity, check.predicted, shown(check.measured), passed))
    return SOURCES + "\n\n" + table(("#", "claim", "source", "measured quantity", "predicted", "measured", ""), rows)


def study_to_markdown(result: StudyResult) -> str:
    """A table per measure: rows are estimators, columns the age of the data."""
    n, settings = middle_samples(result), result.settings
    parts = [
        f"Vocabulary {settings.vocabulary}, length {settings.length}{' (may end early)' if settings.ends else ''}; "
        f"mean over {settings.tasks} random tasks; {n} responses. Columns: learner steps since the data. Objectives "
        "that read the same share a row.",
        distance_table(result),
    ]
    for measure, title in (
        ("bias", "Bias, ‖E ĝ − ∇J‖/‖∇J‖"),
        ("variance", f"Variance of {n} responses, E‖ĝ − E ĝ‖²/‖∇J‖²"),
        ("mse", f"Mean square error of {n} responses, E‖ĝ − ∇J‖²/‖∇J‖²"),
        ("cosine", "Cosine of E ĝ to ∇J"),
        ("batch_cosine", f"Mean cosine of {n} responses to ∇J"),
    ):
        parts += [f"### {title}", measure_table(result, measure, settings.corrections)]
    return "\n\n".join(parts) + "\n"


def middle_samples(result: StudyResult) -> int:
    """The number of responses to show where only one is shown."""
    return sorted(result.settings.samples)[len(result.settings.samples) // 2]


def measure_table(result: StudyResult, measure: str, corrections: Sequence[str]) -> str:
    """A measure of the middle number of responses; objectives of a correction that read the same share a row."""
    n, ages = middle_samples(result), result.settings.staleness
    rows: dict[tuple[str, ...], list[str]] = {}
    for objective, correction in result.settings.estimators:
        if correction in corrections:
            values = [result.row(objective, correction, k, n).measures[measure].value for k in ages]
            rows.setdefault((f"`{correction}`", *(f"{v:.2f}" for v in values)), []).append(f"`{objective}`")
    lines = [(", ".join(objectives), *cells) for cells, objectives in rows.items()]
    return table(("objective", "correction", *(str(k) for k in ages)), lines)


def distance_table(result: StudyResult) -> str:
    """How far apart the policies are at each age."""
    labels = {
        "sequence_kl": "KL(π‖μ), nats per response",
        "sequence_chi2": "χ² of the sequence weight",
        "token_chi2": "χ² of a token weight",
    }
    ages = result.settings.staleness
    rows = [(labels[name], *(f"{result.distance[k][name].value:.2g}" for k in ages)) for name in DISTANCES]
    return table(("learner steps since the data", *(str(k) for k in ages)), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def shown(estimate: Estimate) -> str:
    """`0.43 (0.42 to 0.45)`; without an interval where exact."""
    if estimate.interval is None:
        return f"{estimate.value:.{1 if abs(estimate.value) < 1e-9 else 4}g}"
    return f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g})"


def _pack(estimate: Estimate) -> list[float]:
    return [float(f"{value:.5g}") for value in (estimate.value, *(estimate.interval or ()))]


def _unpack(packed: list[float]) -> Estimate:
    return Estimate(packed[0], (packed[1], packed[2]) if len(packed) > 1 else None)


def _require_schema(data: Json) -> None:
    if data.get("schema") != SCHEMA:
        raise DataError(f"a result of schema {data.get('schema')!r}; this version reads {SCHEMA}")
