"""Every page of finished runs shows what their files hold, by pointer and by keyboard, on a desk and in a hand."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from rlsys.dashboard import Served
from tests.browser.conftest import Open, drawn
from tests.made_run import add_step, append, evaluation, make_run, raise_alarm

PAGES = {
    "overview": "Effective sample size",
    "staleness": "Share of trained tokens by staleness",
    "importance": "Log-ratio of the recorded tokens",
    "fleet": "Timeline",
    "tokens": "Responses",
    "compare": "Runs",
}
DRAWN_ON = {"overview", "staleness", "importance", "fleet", "compare"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two finished runs."""
    root = tmp_path_factory.mktemp("runs")
    served = Served([make_run(root / "first", 12), make_run(root / "second", 7)])
    served.start()
    yield served.url
    served.stop()


@pytest.fixture
def serve() -> Iterator:
    """`serve(directory, ...)` gives the address of a dashboard that lives as long as the test."""
    started = []

    def serve(*directories: Path, **control: Any) -> str:
        started.append(Served(directories, **control))
        started[-1].start()
        return started[-1].url

    yield serve
    for served in started:
        served.stop()


def fits(page: Page) -> bool:
    """No horizontal scrolling."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_every_page_shows_its_data_and_fits_the_screen(
    url: str, open_page: Open, photograph, size: str, theme: str
) -> None:
    page = open_page(url, size=size, theme=theme)
    for name, heading in PAGES.items():
        page.locator(f"nav a[data-page={name}]").click()
        expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
        settled(page, name)
        assert fits(page), name
        photograph(page, f"{name}-{size}-{theme}")


def settled(page: Page, name: str) -> None:
    """Wait for what a page loads beside its series."""
    if name == "staleness":
        expect(page.locator(".heat canvas")).to_be_visible()
    if name == "importance":
        expect(page.get_by_text("144 tokens of 12 of 12 recorded steps")).to_be_visible()
    if name == "fleet":
        expect(page.locator(".lane canvas")).to_have_count(5)
    if name == "tokens":
        expect(page.locator(".tok")).to_have_count(3)
    if name in DRAWN_ON:
        drawn(page)


def test_the_overview_says_where_the_run_stands(url: str, open_page: Open) -> None:
    page = open_page(url)
    expect(page.locator("#phase")).to_have_text("finished")
    expect(page.locator("#step-count")).to_have_text("step 12 of 12")
    tiles = page.locator(".tile")
    expect(tiles.nth(1)).to_contain_text("0.850")
    expect(tiles.nth(1)).to_contain_text("from 0.250 at the start")
    expect(tiles.nth(2)).to_contain_text("p95 2, oldest 2 of at most 4 allowed")
    expect(page.get_by_role("row", name="rejected: too old")).to_contain_text("1")
    expect(page.get_by_text("No alarm stands.")).to_be_visible()


def test_an_alarm_that_is_raised_appears_by_itself_with_cause_and_advice(
    tmp_path: Path, serve, open_page: Open, photograph
) -> None:
    root = make_run(tmp_path / "run", 5)
    page = open_page(serve(root))
    expect(page.get_by_text("No alarm stands.")).to_be_visible()
    raise_alarm(root, cause="<img src=x onerror=alert(1)>")
    alarm = page.locator(".alarm")
    expect(alarm).to_contain_text("ESS low")
    expect(alarm).to_contain_text("0.210 against a limit of 0.300")
    expect(alarm).to_contain_text("<img src=x onerror=alert(1)>")  # text, whatever a run writes
    expect(alarm).to_contain_text("lower staleness.max or learner.lr")
    photograph(page, "alarm")
    raise_alarm(root, state="cleared", step=6)
    expect(alarm).to_have_count(0)
    expect(page.get_by_text("ESS low cleared at step 6")).to_be_visible()


def test_steps_that_are_written_appear_without_loading_the_page_again(tmp_path: Path, serve, open_page: Open) -> None:
    root = make_run(tmp_path / "run", 3, planned=5)
    page = open_page(serve(root))
    expect(page.locator("#step-count")).to_have_text("step 3 of 5")
    expect(page.locator("#phase")).to_have_text("running")
    page.evaluate("window.loaded = 'once'")
    add_step(root, 4)
    expect(page.locator("#step-count")).to_have_text("step 4 of 5")
    expect(page.locator(".legend").first).to_contain_text("batch mean0.400")
    page.locator("nav a[data-page=tokens]").click()
    expect(page.get_by_label("Step", exact=True)).to_have_value("4")
    page.locator("nav a[data-page=overview]").click()
    add_step(root, 5)
    append(root / "metrics.jsonl", evaluation(5))
    (root / "summary.png").write_bytes(b"")
    expect(page.locator("#phase")).to_have_text("finished")
    expect(page.locator("#step-count")).to_have_text("step 5 of 5")
    expect(page.locator(".legend").first).to_contain_text("held-out, greedy0.500")
    assert page.evaluate("window.loaded") == "once"


def test_a_page_whose_reload_failed_says_so_and_tries_again(tmp_path: Path, serve, open_page: Open) -> None:
    root = make_run(tmp_path / "run", 5)
    page = open_page(serve(root))
    legend, lost = page.locator(".legend").first, page.locator("#connection")
    expect(legend).to_contain_text("batch mean0.500")
    page.route("**/series?*", lambda route: route.fulfill(body="the server is busy"))
    lines = (root / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "metrics.jsonl").write_text("".join(lines[:4]))  # resumed after three steps: the page loads all again
    expect(lost).to_be_visible()
    expect(legend).to_contain_text("batch mean0.500")
    page.unroute("**/series?*")
    expect(legend).to_contain_text("batch mean0.300")
    expect(lost).to_be_hidden()


def test_the_keyboard_reaches_every_page(url: str, open_page: Open) -> None:
    page = open_page(url)
    for name, heading in PAGES.items():
        link = page.locator(f"nav a[data-page={name}]")
        expect(link).to_be_visible()
        for _ in range(200):
            page.keyboard.press("Tab")
            if link.evaluate("element => element === document.activeElement"):
                break
        expect(link).to_be_focused()
        page.keyboard.press("Enter")
        expect(link).to_have_attribute("aria-current", "page")
        expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
        page.evaluate("document.activeElement.blur(); window.getSelection().removeAllRanges()")
        page.locator("#theme").focus()


def test_a_token_tells_its_numbers_on_hover_and_on_focus(url: str, open_page: Open) -> None:
    page = open_page(f"{url}#/tokens")
    page.get_by_label("Order").select_option("recorded")
    page.locator("button[data-row='2']").click()
    tokens, detail = page.locator(".tok"), page.locator(".detail")
    expect(page.locator(".text-view")).to_have_text("5+7=12<end>")
    tokens.nth(0).hover()
    expect(detail).to_contain_text("behaviour, log μ−0.5000")
    expect(detail).to_contain_text("policy, log π_θ−0.4000")
    expect(detail).to_contain_text("0.1000  (ratio 1.11)")
    expect(detail).to_contain_text("9, 2 behind the learner")
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(detail).to_contain_text("behaviour, log μ−0.2500")
    expect(detail).to_contain_text("10, 1 behind the learner")
    page.get_by_role("button", name="clip and mask").click()
    page.locator("button[data-row='0']").click()
    expect(page.locator(".tok").nth(1)).to_have_class(re.compile("clipped"))


def test_a_metric_tells_its_meaning_on_hover_and_on_focus(url: str, open_page: Open) -> None:
    page = open_page(url)
    key, tip = page.locator(".legend button", has_text="p95"), page.locator("#tip")
    key.hover()
    expect(tip).to_contain_text("95th percentile over tokens")
    page.mouse.move(1, 1)
    expect(tip).to_be_hidden()
    key.focus()
    expect(tip).to_contain_text("staleness/p95 (versions)")


def test_the_theme_follows_the_system_until_it_is_chosen(url: str, open_page: Open) -> None:
    page = open_page(url, theme="dark")
    root = page.locator("html")
    expect(root).to_have_attribute("data-theme", "dark")
    page.locator("#theme").click()
    expect(root).to_have_attribute("data-theme", "light")
    page.reload()
    expect(root).to_have_attribute("data-theme", "light")


def test_the_timeline_is_looked_at_more_closely_and_moved_along(url: str, open_page: Open) -> None:
    page = open_page(f"{url}#/fleet")
    expect(page.get_by_text("0.0 s to 6.0 s of 6.0 s")).to_be_visible()
    page.get_by_role("button", name="Zoom in").click()
    expect(page.get_by_text("1.5 s to 4.5 s of 6.0 s")).to_be_visible()
    page.get_by_role("button", name="Later").click()
    expect(page.get_by_text("3.0 s to 6.0 s of 6.0 s")).to_be_visible()
    expect(page.locator(".lane").first).to_contain_text("generating")


def test_runs_are_switched_between_and_laid_over_each_other(url: str, open_page: Open) -> None:
    page = open_page(url)
    page.get_by_label("Run").select_option(label="second")
    expect(page.locator("#step-count")).to_have_text("step 7 of 7")
    page.locator("nav a[data-page=compare]").click()
    expect(page.locator("tbody tr")).to_have_count(2)
    expect(page.locator(".legend").first).to_contain_text("first1")  # a reward of 1 after twelve steps
    expect(page.locator(".legend").first).to_contain_text("second0.700")
    page.get_by_role("button", name="wall time").click()
    expect(page.locator(".legend").first).to_contain_text("second0.700")


def test_a_run_that_records_nothing_says_why(tmp_path: Path, serve, open_page: Open, photograph) -> None:
    root = make_run(tmp_path / "bare", 3, rollouts=False, trace=False)
    page = open_page(f"{serve(root)}#/staleness")
    expect(page.get_by_text("records.rollouts_every=0").first).to_be_visible()
    for name, said in {
        "tokens": "records.rollouts_every=0",
        "importance": "records.rollouts_every=0",
        "fleet": "No trace recorded",
    }.items():
        page.locator(f"nav a[data-page={name}]").click()
        expect(page.get_by_text(said).first).to_be_visible()
        photograph(page, f"empty-{name}")
    expect(page.locator("nav a")).to_have_count(5)  # nothing to compare with


def test_a_run_without_a_step_is_a_page_all_the_same(tmp_path: Path, serve, open_page: Open) -> None:
    root = make_run(tmp_path / "run", 0, planned=9, trace=False)
    page = open_page(serve(root))
    expect(page.locator("#step-count")).to_have_text("step 0 of 9")
    expect(page.locator("#phase")).to_have_text("running")
    expect(page.get_by_text("no step yet")).to_be_visible()


def test_the_fleet_page_scales_a_run_where_its_server_can(open_page: Open, serve, tmp_path: Path) -> None:
    asked: list[dict[str, int]] = []

    def scale(workers: Any) -> None:
        asked.append(dict(workers))

    page = open_page(f"{serve(make_run(tmp_path / 'run', 4), scale=scale)}#/fleet")
    rollout = page.get_by_label("rollout workers", exact=True)
    expect(rollout).to_have_value("2")
    expect(page.get_by_label("reward workers", exact=True)).to_have_value("1")
    rollout.fill("3")
    page.get_by_role("button", name="Scale", exact=True).click()
    said = page.get_by_role("status")
    expect(said).to_have_text("Asked for 3 rollout.")
    assert asked == [{"rollout": 3}], "the other role is left as the run has it by now"
    page.get_by_role("button", name="Scale", exact=True).click()
    expect(said).to_have_text("Change a number first.")
    assert len(asked) == 1


def test_without_a_way_to_scale_there_is_no_control(open_page: Open, serve, tmp_path: Path) -> None:
    page = open_page(f"{serve(make_run(tmp_path / 'run', 4))}#/fleet")
    settled(page, "fleet")
    expect(page.get_by_role("button", name="Scale", exact=True)).to_have_count(0)
