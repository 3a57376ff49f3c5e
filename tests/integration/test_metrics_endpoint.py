"""A live run answers a scrape with every metric it has, under the catalogue's names."""

import re
import urllib.request
from pathlib import Path

import pytest

from rlsys.observability.prometheus import gauge_name
from tests.integration.running import rows, running, steps, write_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

SAMPLE = re.compile(r"ray_(rlsys_\w+)\{(.*)\} (\S+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')

Scraped = dict[tuple[str, str | None], float]
"""Value by name, and by staleness, sign or alarm."""


def scrape(endpoint: str) -> Scraped:
    with urllib.request.urlopen(endpoint, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in SAMPLE.findall(text):
        label = dict(LABEL.findall(labels))
        assert label["run"] == "run"
        found[name, label.get("by_staleness") or label.get("by_sign") or label.get("alarm")] = float(value)
    return found


def test_a_scrape_of_a_live_run_gives_the_metrics_of_a_recent_step(tmp_path: Path) -> None:
    write_config(tmp_path, learner={"steps": 100000}, eval={"every": 0}, checkpoint={"every": 0})
    run = tmp_path / "runs" / "run"
    with running(tmp_path, "train", "run.yaml") as command:
        command.until(lambda: len(steps(run)) >= 3)
        (endpoint,) = (row["message"] for row in rows(run / "events.jsonl") if row["kind"] == "metrics_endpoint")
        command.until(lambda: ("rlsys_throughput_step_s", None) in scrape(endpoint))
        scraped = scrape(endpoint)
        command.interrupt()
        command.finish()
    written = {row["step"]: row for row in steps(run)}
    assert scraped["rlsys_step", None] in written
    some = written[min(written)]
    always = [
        key for key in some if key not in ("step", "time") and all(row.get(key) is not None for row in written.values())
    ]
    assert len(always) > 60
    for key in always:
        name, labels = gauge_name(key)
        assert (name, next(iter(labels.values()), None)) in scraped, key
    values = {row["staleness/bound"] for row in written.values()}
    assert scraped["rlsys_staleness_bound", None] in values
    rewards = [row["reward/mean"] for row in written.values()]
    assert min(rewards) <= scraped["rlsys_reward_mean", None] <= max(rewards)
    assert scraped["rlsys_alarm_standing", "not_finite"] == 0
    assert scraped["rlsys_alarm_limit", "ess_low"] == 0.3
    took = sum(row["throughput/step_s"] for row in written.values())
    assert 0 < scraped["rlsys_throughput_step_s_total", None] <= took
