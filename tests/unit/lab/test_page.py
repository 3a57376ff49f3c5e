"""The committed page says what the committed results say."""

from pathlib import Path

import pytest

from rlsys.errors import DataError
from rlsys.lab.page import (
    AIMLESS,
    ASSETS,
    PAGE,
    STUDY,
    TEMPLATE,
    page_text,
    pictured_claims,
    render,
    write_page,
)
from rlsys.lab.report import claims_from_json, claims_to_markdown, read, study_from_json, study_to_markdown

DOCS = Path(__file__).parents[3] / "docs"
RESULTS = DOCS / ASSETS
AGAIN = "docs are out of date: run `rlsys lab docs` (`--render-only` if only the template changed)"


def test_the_page_is_what_its_template_and_results_give() -> None:
    assert (DOCS / PAGE).read_text("utf-8") == page_text(DOCS), AGAIN


def test_the_tables_beside_it_are_those_of_the_results() -> None:
    for name in ("study", "study-aimless"):
        result = study_from_json(read(RESULTS / f"{name}.json"))
        assert (RESULTS / f"{name}.md").read_text("utf-8") == study_to_markdown(result), AGAIN
    claims = claims_from_json(read(RESULTS / "claims.json"))
    assert (RESULTS / "claims.md").read_text("utf-8") == claims_to_markdown(claims) + "\n", AGAIN


def test_the_results_are_of_the_study_and_the_claims_that_the_code_has() -> None:
    from rlsys.lab.claims import CLAIMS

    assert study_from_json(read(RESULTS / "study.json")).settings == STUDY, AGAIN
    assert study_from_json(read(RESULTS / "study-aimless.json")).settings == AIMLESS, AGAIN
    found = claims_from_json(read(RESULTS / "claims.json"))
    assert [(r.number, r.statement, r.predicted) for r in found] == [
        (c.number, c.statement, c.predicted) for c in CLAIMS.values()
    ], AGAIN
    assert all(report.passed for report in found)


def test_every_picture_and_page_that_the_page_shows_is_there() -> None:
    import re

    text = (DOCS / PAGE).read_text("utf-8")
    links = set(re.findall(r"\]\((assets/[^)]+)\)", text))
    assert len(links) >= 7
    assert not [link for link in links if not (DOCS / link).is_file()]
    assert {int(link[-6:-4]) for link in links if "claim-" in link} == pictured_claims(DOCS)


def test_numbers_come_from_the_results() -> None:
    study = study_from_json(read(RESULTS / "study.json"))
    claims = claims_from_json(read(RESULTS / "claims.json"))
    value = study.row("ppo_clip", "tis", 4, 64).measures["cosine"].value
    assert render("a {{cosine ppo_clip tis 4}} b", study, study, claims) == f"a {value:.2f} b"
    assert render("{{aimless cosine ppo_clip tis 4 256}}", study, study, claims) == f"{value:.2f}"
    assert "| `gspo` | `none` |" in render("{{sizes 4 gspo/none}}", study, study, claims)


@pytest.mark.parametrize("field", ["{{cosine ppo tis 4}}", "{{nothing}}", "{{percent 99 0}}", "{{cosine}}"])
def test_a_field_that_the_results_cannot_fill_is_refused(field: str) -> None:
    study = study_from_json(read(RESULTS / "study.json"))
    with pytest.raises(DataError, match="cannot be filled"):
        render(field, study, study, [])


def test_without_template_or_results_the_page_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"study\.json"):
        write_page(tmp_path)
    with pytest.raises(DataError, match="template"):
        pictured_claims(tmp_path)
    assert TEMPLATE.name == PAGE.name
