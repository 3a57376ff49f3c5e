"""A run of the command line is watched from before its first step until after its last."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Open, drawn
from tests.integration.running import Running, running, write_config

STEPS = 30


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("live")
    write_config(directory, learner={"steps": STEPS}, eval={"every": 10}, observability={"dashboard": True})
    return directory


@pytest.fixture(scope="module")
def train(directory: Path, browser) -> Iterator[Running]:
    """`rlsys train`, from when its directory is there; not started where there is no browser to watch it."""
    with running(directory, "train", "run.yaml", "--json") as train:
        train.until(lambda: "dashboard: http" in train.stderr)
        yield train


@pytest.fixture(scope="module")
def url(directory: Path, train: Running) -> Iterator[str]:
    """`rlsys dashboard run`, beside it and after it."""
    with running(directory, "dashboard", "run", "--json") as dashboard:
        dashboard.until(lambda: dashboard.stdout.endswith("\n"))
        yield json.loads(dashboard.stdout)["url"]
        dashboard.interrupt()
        outcome = dashboard.finish()
    assert (outcome.code, outcome.left, outcome.stderr) == (0, [], "")


def watch_steps(page: Page) -> None:
    """Keep every step count the page shows, until it is loaded again."""
    page.evaluate(
        """() => {
            window.counts = [];
            const box = document.getElementById("step-count");
            const note = () => {
                const count = parseInt(box.textContent.split(" ")[1]);
                if (window.counts.at(-1) !== count) window.counts.push(count);
            };
            new MutationObserver(note).observe(box, { childList: true, subtree: true, characterData: true });
            note();
        }"""
    )


def test_a_run_grows_before_ones_eyes_and_stays_when_it_has_ended(
    url: str, train: Running, directory: Path, open_page: Open, photograph
) -> None:
    page = open_page(url)
    page.set_default_timeout(600_000)
    expect(page.locator("#phase")).to_have_text(re.compile("starting|running"))
    watch_steps(page)
    beside = train.stderr.split("dashboard: ")[1].split()[0]
    assert httpx.get(httpx.URL(beside).join("/api/runs"), timeout=60).json()[0]["name"] == "run"

    expect(page.locator("#phase")).to_have_text("finished", timeout=600_000)
    expect(page.locator("#step-count")).to_have_text(f"step {STEPS} of {STEPS}")
    outcome = train.finish()
    assert (outcome.code, outcome.left) == (0, [])
    with pytest.raises(httpx.ConnectError):  # the one beside the run ended with it; this one did not
        httpx.get(beside)
    counts = page.evaluate("window.counts")  # gone if the page had been loaded again
    assert counts == sorted(counts)
    assert len(counts) > 1
    assert counts[-1] == STEPS

    result = json.loads(outcome.stdout)
    tile = page.locator(".tile", has_text="Held-out accuracy")
    expect(tile).to_contain_text(f"{result['accuracy'][str(STEPS)]:.3f}".rstrip("0").rstrip("."))
    trained = page.get_by_role("row", name="trained")
    expect(trained).to_contain_text(str(result["ledger"]["trained"]))
    photograph(page, "live-overview")


def test_every_page_of_a_real_run_has_its_data(url: str, train: Running, open_page: Open, photograph) -> None:
    train.finish()
    page = open_page(f"{url}#/staleness")
    expect(page.locator(".heat canvas")).to_be_visible()
    expect(page.get_by_text("still to be read")).to_have_count(0)
    photograph(page, "live-staleness")
    page.locator("nav a[data-page=importance]").click()
    expect(page.get_by_text(f"of {STEPS} recorded steps")).to_be_visible()
    photograph(page, "live-importance")
    page.locator("nav a[data-page=tokens]").click()
    expect(page.locator(".tok").first).to_be_visible()
    expect(page.get_by_text("decoded by the run's tokenizer")).to_be_visible()
    expect(page.locator(".detail")).to_contain_text("reference, log π_ref")
    photograph(page, "live-tokens")
    page.locator("nav a[data-page=fleet]").click()
    expect(page.get_by_role("heading", name="Rollout workers")).to_be_visible()
    expect(page.locator(".lane canvas").first).to_be_visible()
    drawn(page)
    photograph(page, "live-fleet")
