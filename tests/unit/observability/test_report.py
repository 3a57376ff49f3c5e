"""A report says what the files of a run say, says what they do not, and is a page that needs and runs nothing else."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rlsys.cli import app
from rlsys.config.load import dump_config
from rlsys.errors import DataError
from rlsys.observability.report import write_report
from rlsys.observability.report.document import Section, Table, Text, number, seconds, size
from rlsys.observability.report.facts import paused
from rlsys.observability.report.figures import COLORS, POINTS, _running_mean, _thinned, inline
from rlsys.observability.report.operation import throughput
from rlsys.observability.report.record import RunRecord, find_run, labels, read_run
from rlsys.observability.report.render import plain
from rlsys.observability.report.staleness import staleness
from rlsys.observability.rollouts import write_rollouts
from rlsys.observability.run_directory import RunDirectory
from rlsys.observability.sinks import RunJournal
from rlsys.records import BatchArrays, GroupScore, Rollout, RolloutGroup
from rlsys.scheduling.ledger import Closed, End
from rlsys.versions import VersionSpan
from tests.fakes import make_config, make_prompt

HOSTILE = '</pre><script src="https://evil.example/x.js">alert(1)</script>|`````\n# {{ 7 * 7 }} <img src=x onerror=y>'


def write_batch(directory: RunDirectory, step: int, versions: Sequence[Sequence[int]], text: str) -> None:
    """One group, a response per list of token versions, rewards 1 and 0 in turn."""
    rollouts = tuple(
        Rollout(
            sample=i,
            response_ids=np.arange(len(tokens), dtype=np.int32),
            behavior_logprobs=np.full(len(tokens), -1.0, dtype=np.float32),
            loss_mask=np.ones(len(tokens), dtype=np.bool_),
            version_spans=tuple(VersionSpan(start=k, stop=k + 1, version=v) for k, v in enumerate(tokens)),
            finish_reason="stop",
            text=text,
        )
        for i, tokens in enumerate(versions)
    )
    group = RolloutGroup(
        slot=step, attempt=1, worker="a", prompt=make_prompt(7), rollouts=rollouts, started_at=1.0, finished_at=2.0
    )
    rewards = np.array([(i + 1) % 2 for i in range(len(rollouts))], dtype=np.float32)
    n = sum(map(len, versions))
    arrays = BatchArrays(
        offsets=np.cumsum([0, *map(len, versions)]),
        policy_logprobs=np.full(n, -1.0, dtype=np.float32),
        step_start_logprobs=np.full(n, -1.0, dtype=np.float32),
        reference_logprobs=None,
        clipped=np.zeros(n, dtype=np.bool_),
        masked=np.zeros(n, dtype=np.bool_),
        advantages=rewards,
    )
    score = GroupScore(slot=step, attempt=1, rewards=rewards, scored_at=3.0)
    write_rollouts(directory.rollouts / f"step-{step:06d}.parquet", step, [group], [score], arrays)


def make_run(root: Path, *overrides: str, everything: bool = True) -> RunDirectory:
    """Four steps whose numbers can be added up in the head; `everything`: with what a run may leave out."""
    config = make_config(root, "name=made", "observability.prometheus=false", *overrides)
    directory = RunDirectory(config.path)
    directory.create(dump_config(config))
    journal = RunJournal(directory, config)
    for step in range(5):
        if step in (0, 2, 4):
            journal.step(step, {"eval/accuracy": (0.25, 0.875, 0.75)[step // 2], "eval/prompts": 100.0})
        if step:
            journal.step(step, metrics(step, everything))
    for slot, end in enumerate([End.TRAINED] * 3 + [End.FAILED_REWARD]):
        journal.closed(
            Closed(slot=slot, epoch=0, prompt=slot, end=end, attempts=1 + slot // 3, admitted_version=0, version=slot)
        )
    journal.close()
    if everything:
        raised = {"name": "ess_low", "state": "raised", "severity": "warning", "step": 2, "value": 0.125, "limit": 0.3}
        alarm(directory, "ESS is low", raised | {"cause": "data is <old>", "advice": "lower staleness.max"})
        alarm(directory, "fine again", raised | {"state": "cleared", "step": 3, "value": 0.5})
        for step in (4, 5):  # again by the run's continuation: it still stands
            alarm(directory, "k3 is high", {"name": "k3_high", "state": "raised", "severity": "error", "step": step})
        write_batch(directory, 1, [[0, 0, 0]], "fine")  # ages 0 0 0
        write_batch(directory, 4, [[3, 2], [2, 0, 3]], HOSTILE)  # ages 0 1, 1 3 0
    return directory


def metrics(step: int, everything: bool) -> dict[str, float | None]:
    values: dict[str, float | None] = {
        "reward/mean": step / 4,
        "staleness/mean": 1.5,
        "staleness/max": float(min(step, 3)),
        "staleness/bound": 4.0,
        "staleness/violations": 0.0,
        "staleness/in_flight/mean": 0.375,
        "staleness/in_queue/mean": 1.125,
        "staleness/rejected_groups": 0.0,
        "importance/k3": 0.01 * step,
        "importance/ess_token": 0.9,
        "importance/ess_sequence": 1 - step / 8,
        "importance/ess_sequence/by_staleness/0": 0.96875 if step < 3 else None,
        "importance/ess_sequence/by_staleness/1": 0.5 + step / 16,
        "importance/clip_fraction": 0.125,
        "throughput/step_s": 2.0,
        "throughput/learner_s": 0.5,
        "throughput/learner_idle_s": 0.25 * step,
        "weight_sync/pause_s": 0.125,
        "weight_sync/bytes": 3_200_000.0,
        "ledger/lost": 0.0,
    }
    if everything:
        values |= {
            "alarms/raised": float(step == 2),
            "kl/reference_k3": 0.03125,
            "split/tokens": 100.0,
            "split/seconds": 0.25,
            **{f"split/{part}/{kind}": 0.0625 * step for part in ("drift", "lag", "engine") for kind in ("k3", "mean")},
            "audit/cosine": 0.8125 if step == 2 else None,
            "audit/cosine_floor": 0.9375 if step == 2 else None,
        }
    return values


def alarm(directory: RunDirectory, message: str, fields: dict[str, Any]) -> None:
    with directory.notes.open("a") as file:
        file.write(json.dumps({"time": 1.0, "kind": "alarm", "message": message, "alarm": fields}) + "\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, str, str]:
    """The run with everything, and its report as HTML and as Markdown."""
    directory = make_run(tmp_path_factory.mktemp("made"))
    written = write_report([directory.root])
    assert (written.html, written.markdown) == (directory.root / "report.html", directory.root / "report.md")
    return directory, written.html.read_text(), written.markdown.read_text()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The report on a run that recorded only what every run does."""
    directory = make_run(tmp_path_factory.mktemp("bare"), "records.rollouts_every=0", everything=False)
    written = write_report([directory.root])
    return written.html.read_text(), written.markdown.read_text()


def rows(markdown: str, first: str) -> list[str]:
    """The other cells of the first table row that begins so; names without the small print below them."""
    for line in markdown.splitlines():
        cells = [re.sub(r"<br>.*|</?code>|\\", "", cell.strip()) for cell in line.strip("|").split(" | ")]
        if cells[0] == first:
            return cells[1:]
    raise AssertionError(f"no row {first!r}")


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would take them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


# -- the numbers ------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_one_computes_by_hand(made: tuple[RunDirectory, str, str]) -> None:
    _, page, text = made
    assert rows(text, "held-out accuracy, first") == ["0.25", "step 0"]
    assert rows(text, "held-out accuracy, last") == ["0.75", "step 4"]
    assert rows(text, "held-out accuracy, best") == ["0.875", "step 2"]
    assert rows(text, "mean reward, last tenth of the steps")[0] == "1"
    assert rows(text, "staleness/max") == ["2.25", "1", "3", "1", "3"]
    assert rows(text, "importance/ess_sequence") == ["0.6875", "0.9688", "0.6562", "–", "–", "–"]
    assert rows(text, "learner waited for a batch")[0] == "31.2%"  # 0.25 (1+2+3+4) of 8 s
    assert rows(text, "learner computed")[0] == "25.0%"
    assert rows(text, "decoding stood still for syncs")[0] == "6.2%"  # 0.5 of 8 s, one worker
    assert rows(text, "split/lag/k3")[0] == "0.1562"
    assert rows(text, "audit/cosine")[0] == "0.8125"
    assert "25.0% was gained in flight" in text
    assert "25.0% was gained in flight" in page
    assert "3.2 MB each" in text


def test_ages_are_counted_from_the_tokens(made: tuple[RunDirectory, str, str]) -> None:
    directory, _, text = made
    ages = read_run(directory.root).ages
    assert ages is not None
    assert ages.by_step == {1: (3,), 4: (2, 2, 0, 1)}
    assert ages.total == [5, 2, 0, 1]
    assert [rows(text, str(age)) for age in range(4)] == [["5", "62.5%"], ["2", "25.0%"], ["0", "0.0%"], ["1", "12.5%"]]


def test_every_end_of_the_ledger_is_counted(made: tuple[RunDirectory, str, str]) -> None:
    text = made[2]
    assert rows(text, "trained") == ["3", "75.0%", "1", "0"]
    assert rows(text, "failed_reward") == ["1", "25.0%", "3", "1"]
    assert "Lost: 0." in text


# -- a run of two processes --------------------------------------------------------------------------------------------


COUNTED: dict[str, list[float | None]] = {  # by step; the run was resumed after the second
    "ledger/trained": [2, 4, 2, 4],
    "staleness/rejected_groups": [0, 1, 0, 3],
    "staleness/rejected_tokens": [0, 10, 0, 60],
    "staleness/rejected_length": [None, 5, None, 10],
    "staleness/rejected_reward": [None, 0.0, None, 0.5],
    "staleness/trained_length": [4, 6, 9, 8],
    "staleness/trained_reward": [0.0, 0.25, 0.5, 0.75],
    "workers/rollout/desired": [2, 2, 2, 2],
    "workers/rollout/ready": [2, 1, 2, 2],
    "workers/rollout/restarts": [0, 1, 0, 2],
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    run = read_run(make_run(tmp_path_factory.mktemp("resumed"), everything=False).root)
    steps = tuple({**row, **{name: values[i] for name, values in COUNTED.items()}} for i, row in enumerate(run.steps))
    rejected = ["rejected_stale", "rejected_nonfinite", "rejected_stale", "rejected_stale", "rejected_no_signal"]
    return replace(run, steps=steps, ends=tuple({"end": end} for end in ["trained"] * 8 + rejected))


def cells(section: Section) -> dict[str, list[str]]:
    """The rows of a chapter's tables by their first cell."""
    rows = [row for block in section.blocks if isinstance(block, Table) for row in block.rows]
    return {row[0].text: [cell.text for cell in row[1:]] for row in rows}


def said(section: Section) -> str:
    return " ".join(block.text for block in section.blocks if isinstance(block, Text))


def test_a_counter_that_drops_begins_another_part_and_the_parts_are_added(resumed: RunRecord) -> None:
    assert [[row["step"] for row in part] for part in resumed.parts] == [[1, 2], [3, 4]]
    assert resumed.count("ledger/trained") == 8
    assert resumed.count("workers/reward/restarts") is None
    assert "at least 1 ready at every step; 3 were started again." in said(throughput(resumed))


def test_what_was_rejected_is_that_of_the_ledger_and_means_are_over_all_parts(resumed: RunRecord) -> None:
    shown = cells(staleness(resumed))
    assert shown["staleness/rejected_groups"] == ["4"]  # 1 + 3; that there was no signal is another end
    assert shown["staleness/rejected_tokens"] == ["70"]
    assert shown["staleness/rejected_length"] == ["8.75"]  # (1 * 5 + 3 * 10) / 4 groups
    assert shown["staleness/rejected_reward"] == ["0.375"]
    assert shown["staleness/trained_length"] == ["7"]  # 6 and 8, of 4 groups each
    assert shown["staleness/trained_reward"] == ["0.5"]


def test_none_was_rejected_only_if_no_part_rejected_any(resumed: RunRecord) -> None:
    none = "No group was rejected"
    later = replace(resumed, steps=resumed.steps[:3])  # the newest step has rejected none
    assert none not in said(staleness(later))
    assert none not in said(staleness(replace(later, ends=())))
    assert cells(staleness(replace(later, ends=())))["staleness/rejected_groups"] == ["1"]
    assert none in said(staleness(replace(resumed, ends=({"end": "trained"},))))


def test_decoding_stood_still_of_the_time_of_the_workers_there_were(resumed: RunRecord) -> None:
    """0.125 s at each of four steps of 2 s; where nobody counted the workers, as many as were configured."""
    assert paused(resumed) == 0.5 / (4 + 2 + 4 + 4)
    ready = [1, 3, 4, None]
    steps = tuple({**row, "workers/rollout/ready": n} for row, n in zip(resumed.steps, ready, strict=True))
    configured = {**resumed.config, "rollout": {"workers": 8}}
    assert paused(replace(resumed, steps=steps, config=configured)) == 0.5 / (2 + 6 + 8 + 16)


# -- what else there is to read ----------------------------------------------------------------------------------------


def test_an_alarm_is_shown_with_its_cause_its_advice_and_when_it_was_cleared(
    made: tuple[RunDirectory, str, str],
) -> None:
    directory, page, text = made
    assert rows(text, "ess_low")[:5] == ["2", "3", "0.125", "0.3", "data is &lt;old&gt;"]
    assert rows(text, "k3_high")[:4] == ["4", "stands", "–", "–"]
    assert "data is &lt;old&gt;<small>lower staleness.max</small>" in page
    assert rows(text, "k3_high")[4] == "k3 is high", "one without a cause says what it says"
    first, second = read_run(directory.root).alarms
    assert (first.raised, first.cleared, second.cleared) == (2, 3, None)


def test_html_and_markdown_have_the_same_chapters_and_every_picture_is_there(
    made: tuple[RunDirectory, str, str],
) -> None:
    directory, page, text = made
    chapters = re.findall(r"^## (.*)$", text, re.M)
    assert re.findall(r"<h2>(.*?)</h2>", page) == chapters
    assert len(chapters) == len(set(chapters)) >= 12
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(pictures) == page.count("<svg") > 12
    assert all((directory.root / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


# -- what is not there ------------------------------------------------------------------------------------------------


def test_what_was_not_recorded_is_said_and_not_drawn(bare: tuple[str, str]) -> None:
    for text in bare:
        for said in (
            "not recorded: the ages of single tokens (records.rollouts",
            "not recorded: drift, policy lag and engine mismatch (no step of this run was probed)",
            "not recorded: the corrected stale gradient against a fresh one (audit.every is 0)",
            "not recorded: KL to the reference (the metrics are missing)",
            "not recorded: alarms (the run watched for none)",
            "not recorded: responses (records.rollouts",
        ):
            assert said in text.replace("\\", "")
    assert "k3 of each part" not in bare[0]
    assert not [name for name in ("split-k3", "audit", "kl", "ages") if f"report-figures/{name}.png" in bare[1]]


def test_a_run_without_a_step_has_a_report(tmp_path: Path) -> None:
    config = make_config(tmp_path, "name=young")
    RunDirectory(config.path).create(dump_config(config))
    written = write_report([config.path])
    text = written.markdown.read_text()
    assert "This run has not done a learner step." in text
    assert "not recorded: staleness (no learner step)" in text
    assert "![" not in text
    assert "<svg" not in written.html.read_text()


def test_a_last_line_cut_short_is_left_out_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    directory = make_run(tmp_path, everything=False)
    with directory.metrics.open("a") as file:
        file.write('{"step": 9, "ti')
    assert len(read_run(directory.root).steps) == 4
    with directory.metrics.open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"made: a file of this run is damaged"):
        read_run(directory.root)


@pytest.mark.parametrize("damage", [lambda data: b"no parquet", lambda data: data[: len(data) // 2], lambda data: b""])
def test_a_damaged_recorded_step_is_an_error_that_names_the_file(tmp_path: Path, damage: Any) -> None:
    directory = make_run(tmp_path)
    file = directory.rollouts / "step-000004.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"made/rollouts/step-000004\.parquet: this file is damaged"):
        read_run(directory.root)


# -- whatever a model writes is text ----------------------------------------------------------------------------------


def test_a_hostile_response_is_shown_and_does_nothing(made: tuple[RunDirectory, str, str]) -> None:
    _, html, text = made
    page = Page(html)
    assert HOSTILE in page.words
    assert not {"script", "img", "iframe", "link", "object", "embed", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    inside = text.split("``````text\n")  # longer than the longest fence inside
    assert any(part.startswith(HOSTILE + "\n``````") for part in inside)
    assert "49" not in "".join(page.words).split("# {{")[1][:12]


def test_text_outside_of_fences_cannot_become_markup() -> None:
    assert plain("a|b\n# <b> *c* [d](e) `f` &amp;") == "a\\|b \\# &lt;b&gt; \\*c\\* \\[d\\](e) \\`f\\` &amp;amp;"


def test_the_page_loads_nothing(made: tuple[RunDirectory, str, str]) -> None:
    page = Page(made[1])
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
            assert value.startswith("#"), f"{name}={value}"
        assert name != "xmlns"
    style = made[1].split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert re.findall(r"url\((?!#)", made[1]) == []
    outside = made[1].replace("https://evil.example/x.js", "")  # the text of the hostile response
    assert "http:" not in outside
    assert "https:" not in outside
    assert "default-src 'none'" in made[1]


def test_references_inside_pictures_are_to_their_own_parts_and_names_are_unique(
    made: tuple[RunDirectory, str, str],
) -> None:
    page = Page(made[1])
    names = [value for name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    assert set(re.findall(r"url\(#([^)]+)\)", made[1])) <= set(names)
    assert {value[1:] for name, value in page.attributes if name == "href"} <= set(names)


def test_colours_of_pictures_belong_to_the_page_in_light_and_dark(made: tuple[RunDirectory, str, str]) -> None:
    html = made[1]
    light, dark = html.split("prefers-color-scheme: dark")
    body = html.split("</style>")[1]
    for color, variable in COLORS.items():
        assert color not in body
        assert f"--{variable}:" in light
        assert f"--{variable}:" in dark
    assert "var(--series-0)" in body
    assert "<style" not in body


# -- several runs -----------------------------------------------------------------------------------------------------


ODD = "<b>&"
"""A directory may be called anything; its name is in headings and legends."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict[str, Any]]:
    """A comparison as the command line writes it: HTML, Markdown, and the JSON it printed."""
    root = tmp_path_factory.mktemp("compared")
    odd = make_run(root / "a", "learner.lr=0.25").root.rename(root / ODD)
    other = make_run(root / "b", "staleness.max=2", everything=False).root
    result = CliRunner().invoke(app, ["report", str(odd), str(other), "--json", "--out", str(root / "out")])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["html"] == str(root / "out" / "comparison.html")
    return Path(found["html"]).read_text(), Path(found["markdown"]).read_text(), found["runs"]


def test_the_facts_for_programs_are_the_numbers_of_the_page(compared: tuple[str, str, dict[str, Any]]) -> None:
    facts = compared[2][ODD]
    assert (facts["accuracy_best"], facts["accuracy_best_step"]) == (0.875, 2)
    assert (facts["alarms"], facts["alarms_standing"]) == (2, 1)
    assert facts["learner_idle"] == 0.3125
    assert facts["masked_fraction"] is None
    assert rows(compared[1], "learner waited") == ["31.2%", "31.2%"]


def test_a_label_of_a_run_is_escaped_everywhere(compared: tuple[str, str, dict[str, Any]]) -> None:
    page = Page(compared[0])
    assert page.words.count(ODD) > 5
    assert page.tags.count("b") == page.tags.count("figcaption")
    assert ODD not in compared[1]


def test_only_fields_that_differ_are_in_the_table_of_differences(compared: tuple[str, str, dict[str, Any]]) -> None:
    differing = compared[1].split("| field |")[1].split("\n\n")[0].splitlines()[2:]
    names = [re.sub(r"</?code>|\\", "", line.split(" | ")[0].strip("| ")) for line in differing]
    assert names == ["staleness.max", "learner.lr"]
    assert rows(compared[1], "learner.lr") == ["0.25", "0.0005"]
    assert rows(compared[1], "staleness.max") == ["4", "2"]


def test_runs_are_told_apart_side_by_side_and_in_every_picture(compared: tuple[str, str, dict[str, Any]]) -> None:
    page, text, _ = compared
    assert rows(text, "held-out accuracy, best") == ["0.875", "0.875"]
    assert rows(text, "split: lag, k3") == ["0.1562", "–"]
    assert rows(text, "k3_high") == ["4 to the end", "–"]
    pictures = re.findall(r"<figure.*?</figure>", page, re.S)
    reward = next(p for p in pictures if "<b>reward/mean</b>" in p)
    assert "&lt;b&gt;&amp;" in reward
    assert "made" in reward
    audit = next(p for p in pictures if "<b>audit/cosine</b>" in p)
    assert "not recorded: made" in audit


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    directory = make_run(tmp_path, everything=False)
    with pytest.raises(DataError, match="same run is given twice"):
        write_report([directory.root, directory.root])


# -- finding runs, and small parts ------------------------------------------------------------------------------------


def test_a_run_is_found_by_name_or_directory_and_a_wrong_one_names_those_there_are(tmp_path: Path) -> None:
    directory = make_run(tmp_path, everything=False)
    assert find_run("made", tmp_path) == directory.root
    assert find_run(directory.root, tmp_path / "none") == directory.root
    with pytest.raises(DataError, match=r"other: no run there .* holds made"):
        find_run("other", tmp_path)


def test_labels_are_as_short_as_they_can_be() -> None:
    assert labels([Path("/x/a"), Path("/y/b")]) == ["a", "b"]
    assert labels([Path("/x/a"), Path("/y/a")]) == ["x/a", "y/a"]


def test_long_series_keep_their_mean_and_short_ones_every_point() -> None:
    points = [(float(i), float(i % 7)) for i in range(10 * POINTS)]
    x, y = _thinned(points)
    assert len(x) == POINTS
    assert sum(y) / len(y) == pytest.approx(sum(v for _, v in points) / len(points))
    assert _thinned(points[:3]) == ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])
    assert _running_mean([0.0, 3.0, 6.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0]


def test_svg_loses_its_surroundings_and_keeps_its_references() -> None:
    text = (
        '<?xml version="1.0"?><!DOCTYPE svg PUBLIC "x" "http://x"><svg xmlns:xlink="http://y" width="1.5pt" '
        'height="2pt" viewBox="0 0 1 2" xmlns="http://z"><metadata><a href="http://w"/></metadata><!-- http://v -->'
        '<g id="a"/><g id="b"/><use xlink:href="#a" style="fill: #2f6fde"/></svg>'
    )
    assert inline("n", text) == (
        '<svg viewBox="0 0 1 2"><g id="n-a"/><g/><use href="#n-a" style="fill: var(--series-0)"/></svg>'
    )


def test_numbers_are_short_and_right() -> None:
    assert [number(v) for v in (None, 0.0, 4.0, 0.00123456, 12345.67, 1e-9, -0.5)] == [
        "–", "0", "4", "0.001235", "12346", "1e-09", "-0.5"
    ]  # fmt: skip
    assert [seconds(v) for v in (0.01234, 59.0, 125.0, 9060.0)] == ["0.0123 s", "59 s", "2 min 5 s", "2 h 31 min"]
    assert [size(v) for v in (12.0, 3_187_200.0, 2e9)] == ["12 B", "3.19 MB", "2 GB"]
