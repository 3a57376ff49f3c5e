"""A served run is told as it grows, in a thread that ends when it is asked to."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import rlsys.dashboard
from rlsys.dashboard import Served, serve_in_thread
from rlsys.errors import ConfigError
from tests.made_run import add_step, make_run, raise_alarm

STATIC = Path(rlsys.dashboard.__file__).parent / "static"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", 3, planned=9)


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    served = serve_in_thread(root)
    yield served
    served.stop()


def messages(stream: httpx.Response) -> Iterator[tuple[str, dict]]:
    kind = ""
    for line in stream.iter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def test_a_watcher_gets_the_rows_it_has_not_seen_and_nothing_else(served: Served, root: Path) -> None:
    query = {"names": "reward/mean,eval/accuracy", "runs": "0", "after": "0.2"}
    with httpx.stream("GET", f"{served.url}api/stream", params=query, timeout=60) as stream:
        news = messages(stream)
        kind, rows = next(news)
        assert (kind, rows["step"]) == ("rows", [2, 3])  # the file's first rows: an evaluation, step 1
        assert rows["values"] == {"reward/mean": [0.2, 0.3], "eval/accuracy": [None, None]}
        kind, summary = next(news)
        assert (kind, summary["step"], summary["alarms"]) == ("summary", 3, [])
        add_step(root, 4)
        seen = [next(news), next(news)]
        assert sorted(kind for kind, _ in seen) == ["rows", "summary"]
        assert dict(seen)["rows"]["values"]["reward/mean"] == [0.4]
        raise_alarm(root)
        kind, summary = next(news)
        assert (kind, [alarm["name"] for alarm in summary["alarms"]]) == ("summary", ["ess_low"])


def test_a_watcher_whose_past_was_taken_back_is_told_to_start_again(served: Served, root: Path) -> None:
    with httpx.stream("GET", f"{served.url}api/stream", params={"names": "reward/mean"}, timeout=60) as stream:
        news = messages(stream)
        assert [next(news)[0], next(news)[0]] == ["rows", "summary"]
        lines = (root / "metrics.jsonl").read_text().splitlines(keepends=True)
        (root / "metrics.jsonl").write_text("".join(lines[:2]))
        assert [next(news)[0], next(news)[0]] == ["reset", "summary"]
    series = httpx.get(f"{served.url}api/runs/0/series", params={"names": "reward/mean"}).json()
    assert (series["generation"], series["step"]) == (1, [0, 1])


def test_thousands_of_steps_are_sent_as_hundreds_of_points(served: Served, root: Path) -> None:
    rows = (json.dumps({"step": step, "time": float(step), "reward/mean": 0.5}) for step in range(4, 5004))
    with (root / "metrics.jsonl").open("a") as file:
        file.writelines(row + "\n" for row in rows)
    series = httpx.get(f"{served.url}api/runs/0/series", params={"names": "reward/mean"}).json()
    assert len(series["step"]) == 799
    assert (series["step"][0], series["step"][-1]) == (0, 5003)


def test_stopping_ends_open_streams_and_closes_the_port(root: Path) -> None:
    served = serve_in_thread(root)
    with httpx.stream("GET", f"{served.url}api/stream", timeout=60) as stream:
        news = messages(stream)
        next(news)
        served.stop()
        assert [kind for kind, _ in news] == ["closing"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(served.url)


def test_a_port_in_use_is_said(root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}"):
            serve_in_thread(root, port)


def test_off_loopback_the_address_carries_the_token(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSYS_DASHBOARD_TOKEN", "a-token-of-this-test-0123")
    served = Served([root], "0.0.0.0")
    served.stop()
    assert served.url.endswith("/?token=a-token-of-this-test-0123")
    assert socket.gethostname() in served.url  # 0.0.0.0 is no address to call


def test_the_page_refers_to_nothing_outside_and_has_no_code_in_it() -> None:
    page = (STATIC / "index.html").read_text()
    assert not re.findall(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=|https?://", page)
    for kind in ("*.js", "*.css"):
        for path in STATIC.rglob(kind):
            if "vendor" not in path.parts:
                assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(|https?://", path.read_text()), (
                    path
                )


def test_every_metric_a_page_names_is_defined() -> None:
    from rlsys.observability.catalogue import CATALOGUE

    areas = "|".join(sorted({name.split("/")[0] for name in CATALOGUE}))
    named = {
        name
        for path in (STATIC / "js" / "pages").glob("*.js")
        for name in re.findall(rf'"((?:{areas})/[\w/]+)"', path.read_text())
    }
    assert len(named) > 30
    assert named <= set(CATALOGUE)


def test_what_is_vendored_has_its_licence() -> None:
    assert "MIT License" in (STATIC / "vendor" / "uplot" / "LICENSE").read_text()
    assert (
        (STATIC / "vendor" / "uplot" / "uPlot.iife.min.js")
        .read_text()
        .startswith("/*! https://github.com/leeoniya/uPlot (v1.6.32) */")
    )
