"""docs/choosing-an-objective.md: prose from a template, every number and table from the lab's JSON results.

The template is Markdown with `{{name argument …}}` in it:

    {{bias ppo_clip none 16}}        a measure of an estimator at an age, to two digits; also variance, mse, cosine,
    {{batch_cosine aipo tis 16 256}} batch_cosine; the last is the number of responses (default: the middle)
    {{aimless cosine gspo none 16}}  the same of the study with aimless drift
    {{distance token_chi2 4}}        how far the policies are apart at an age; {{aimless distance …}}
    {{table cosine none tis}}        a table of a measure for some corrections
    {{sizes 16 aipo/tis gspo/none}}  a table of batch_cosine at an age, for each number of responses
    {{percent 5 5}}                  what a claim measured in one of its checks; {{note 3 0}}: a note of it
    {{distances}} {{settings}} {{claims}} {{sources}}
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rlsys.errors import DataError
from rlsys.lab.claims.outcome import SOURCES
from rlsys.lab.report import (
    ClaimReport,
    claims_from_json,
    distance_table,
    measure_table,
    middle_samples,
    read,
    shown,
    study_from_json,
    table,
)
from rlsys.lab.study import MEASURES, StudyResult, StudySettings

PAGE = Path("choosing-an-objective.md")
TEMPLATE = Path("templates") / PAGE
ASSETS = Path("assets/lab")
STUDY = StudySettings(staleness=(0, 1, 2, 4, 8, 16), tasks=16)
"""What the page's study measures."""
AIMLESS = replace(STUDY, drift="aimless", learning_rate=0.03, corrections=("none", "tis"))
"""The same with a drift as large, in a random direction."""
STUDIES = {"study": STUDY, "study-aimless": AIMLESS}


def write_page(docs: Path) -> Path:
    """Render the template with the results in `docs/assets/lab`."""
    path = docs / PAGE
    path.write_text(page_text(docs), "utf-8")
    return path


def page_text(docs: Path) -> str:
    """The page that template and results give. Raises DataError on a field the results cannot fill."""
    study, aimless = (study_from_json(read(docs / ASSETS / f"{name}.json")) for name in STUDIES)
    claims = claims_from_json(read(docs / ASSETS / "claims.json"))
    return render(template(docs), study, aimless, claims)


def template(docs: Path) -> str:
    """Raises DataError where it is not, as outside a checkout."""
    path = docs / TEMPLATE
    if not path.is_file():
        raise DataError(f"{path}: the page's template is not here; run this at the root of a checkout")
    return path.read_text("utf-8")


def pictured_claims(docs: Path) -> set[int]:
    """The claims whose pictures the template shows."""
    return {int(number) for number in re.findall(r"claim-(\d\d)\.png", template(docs))}


def render(text: str, study: StudyResult, aimless: StudyResult, claims: list[ClaimReport]) -> str:
    """Fill every `{{…}}`."""
    numbered = {report.number: report for report in claims}
    other = _study_fields(aimless)
    fields: dict[str, Callable[..., str]] = {
        **_study_fields(study),
        "aimless": lambda name, *arguments: other[name](*arguments),
        "percent": lambda number, place: f"{numbered[int(number)].checks[int(place)].measured.value:.1%}",
        "note": lambda number, place: numbered[int(number)].notes[int(place)],
        "claims": lambda: claims_table(claims),
        "sources": lambda: SOURCES,
    }

    def fill(match: re.Match[str]) -> str:
        name, *arguments = match[1].split()
        try:
            return fields[name](*arguments)
        except (KeyError, IndexError, TypeError, ValueError) as problem:
            raise DataError(f"{TEMPLATE}: {match[0]} cannot be filled: {problem!r}") from problem

    return re.sub(r"\{\{(.+?)\}\}", fill, text)


def _study_fields(study: StudyResult) -> dict[str, Callable[..., str]]:
    middle = middle_samples(study)

    def measure(name: str) -> Callable[..., str]:
        def value(objective: str, correction: str, staleness: str, samples: str = str(middle)) -> str:
            return f"{study.row(objective, correction, int(staleness), int(samples)).measures[name].value:.2f}"

        return value

    def measures(name: str, *corrections: str) -> str:
        return measure_table(study, name, corrections)

    return {
        **{name: measure(name) for name in MEASURES},
        "table": measures,
        "sizes": lambda staleness, *estimators: sizes_table(study, int(staleness), estimators),
        "distance": lambda name, staleness: f"{study.distance[int(staleness)][name].value:.2g}",
        "distances": lambda: distance_table(study),
        "settings": lambda: settings_text(study.settings),
    }


def sizes_table(study: StudyResult, staleness: int, estimators: Sequence[str]) -> str:
    """Mean cosine of batches to ∇J at one age, for each number of responses, with half its 99% interval."""
    rows = []
    for name in estimators:
        objective, correction = name.split("/")
        cells = []
        for n in study.settings.samples:
            found = study.row(objective, correction, staleness, n).measures["batch_cosine"]
            cells.append(f"{found.value:.2f} ± {(found.high - found.low) / 2:.2f}")
        rows.append((f"`{objective}`", f"`{correction}`", *cells))
    return table(("objective", "correction", *(f"{n} responses" for n in study.settings.samples)), rows)


def settings_text(settings: StudySettings) -> str:
    return (
        f"{settings.tasks} random tasks over responses of {settings.length} tokens from a vocabulary of "
        f"{settings.vocabulary} ({settings.vocabulary**settings.length} responses)"
    )


def claims_table(reports: list[ClaimReport]) -> str:
    """One row a claim: its first check stands for it."""
    rows = [
        (
            str(report.number),
            report.statement,
            report.source,
            f"{report.checks[0].quantity}: {shown(report.checks[0].measured)}",
            f"{sum(check.passed for check in report.checks)} of {len(report.checks)}",
        )
        for report in reports
    ]
    return table(("#", "claim", "source", "for example", "checks passed"), rows)
