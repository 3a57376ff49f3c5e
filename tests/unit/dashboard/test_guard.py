"""Nobody reads a run over the network without the token, and no other site's page reads it over loopback."""

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from rlsys.dashboard.app import make_app
from rlsys.dashboard.guard import choose_token, is_loopback
from rlsys.errors import ConfigError
from tests.made_run import make_run

TOKEN = "a-token-of-this-test-0123"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("guard") / "run", 2)


def client(root: Path, host: str, token: str | None) -> TestClient:
    app = make_app([root], host=host, token=token, stopping=threading.Event())
    return TestClient(app, base_url=f"http://{host}:8000")


@pytest.mark.parametrize("path", ["/", "/api/runs", "/static/js/main.js", "/api/stream", "/nowhere"])
def test_off_loopback_nothing_is_given_without_the_token(root: Path, path: str) -> None:
    page = client(root, "192.0.2.7", TOKEN)
    assert page.get(path).status_code == 401
    assert page.get(path, params={"token": "another-token-0123456"}).status_code == 401
    assert page.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
    assert page.get(path, headers={"cookie": "rlsys=wrong; ="}).status_code == 401


def test_the_token_once_in_the_address_becomes_a_cookie_that_scripts_cannot_read(root: Path) -> None:
    page = client(root, "192.0.2.7", TOKEN)
    first = page.get("/", params={"token": TOKEN})
    assert first.status_code == 200
    assert "HttpOnly" in first.headers["set-cookie"]
    assert "SameSite=Strict" in first.headers["set-cookie"]
    assert page.get("/api/runs").status_code == 200  # by the cookie alone


def test_programs_send_the_token_as_a_bearer(root: Path) -> None:
    page = client(root, "192.0.2.7", TOKEN)
    answer = page.get("/api/runs", headers={"authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("name", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:80"])
def test_on_loopback_another_sites_name_is_refused(root: Path, name: str) -> None:
    page = client(root, "127.0.0.1", None)
    assert page.get("/api/runs", headers={"host": name}).status_code == 421


@pytest.mark.parametrize("name", ["127.0.0.1:8000", "localhost", "LOCALHOST:99", "[::1]:8000"])
def test_on_loopback_this_machines_names_need_no_token(root: Path, name: str) -> None:
    assert client(root, "127.0.0.1", None).get("/api/runs", headers={"host": name}).status_code == 200


def test_a_token_that_was_given_is_demanded_on_loopback_too(root: Path) -> None:
    page = client(root, "127.0.0.1", TOKEN)
    assert page.get("/api/runs").status_code == 401
    assert page.get("/api/runs", params={"token": TOKEN}).status_code == 200


def test_off_loopback_there_is_always_a_token() -> None:
    assert choose_token("127.0.0.1", None) is None
    made = choose_token("0.0.0.0", None)
    assert made is not None
    assert len(made) >= 32
    assert made != choose_token("0.0.0.0", None)
    assert choose_token("127.0.0.1", TOKEN) == TOKEN


@pytest.mark.parametrize("given", ["short", "with a blank in it, and long", "breaks;cookies=in-two-pieces"])
def test_a_token_that_is_guessed_or_breaks_a_cookie_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="RLSYS_DASHBOARD_TOKEN must be"):
        choose_token("0.0.0.0", given)


def test_loopback_is_recognized() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.7", "example.org", "")))


@pytest.mark.parametrize("path", ["/", "/api/runs", "/static/css/base.css", "/nowhere"])
def test_every_answer_forbids_foreign_and_inline_code(root: Path, path: str) -> None:
    policy = client(root, "127.0.0.1", None).get(path).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
        "/static/css/..%2f..%2f..%2frun.py",
        "/api/runs/..%2f..%2fetc/series",
        "/api/runs/-1/series",
        "/api/runs/1/series",
        "/api/runs/0/response?step=1&row=99",
        "/api/runs/0/response?step=77&row=0",
    ],
)
def test_no_address_leads_out_of_the_static_files_and_the_given_runs(root: Path, path: str) -> None:
    assert client(root, "127.0.0.1", None).get(path).status_code in (400, 404)


@pytest.mark.parametrize("query", ["histogram?from=x", "timeline?from=nan", "timeline?to=x", "responses?sort=name"])
def test_a_malformed_question_is_the_askers_mistake(root: Path, query: str) -> None:
    assert client(root, "127.0.0.1", None).get(f"/api/runs/0/{query}").status_code == 400


# Acting


ASKED = {"rollout": 3}


def acting(root: Path, asked: list, *, host: str = "127.0.0.1", open_to_read: bool = True) -> TestClient:
    def scale(workers: Mapping[str, int]) -> None:
        if workers.get("rollout", 1) > 8:
            raise ConfigError("rollout workers: 9: must be a whole number from 1 to 8")
        asked.append(dict(workers))

    app = make_app([root], host=host, token=TOKEN, stopping=threading.Event(), scale=scale, open_to_read=open_to_read)
    return TestClient(app, base_url=f"http://{host}:8000", headers={"origin": f"http://{host}:8000"})


def test_on_loopback_reading_stays_free_and_acting_needs_the_token(root: Path) -> None:
    asked: list = []
    page = acting(root, asked)
    assert [run["acts"] for run in page.get("/api/runs").json()] == [True]
    assert page.post("/api/runs/0/workers", json=ASKED).status_code == 401
    assert asked == []
    page.get("/", params={"token": TOKEN})
    answer = page.post("/api/runs/0/workers", json=ASKED)  # by the cookie
    assert (answer.status_code, answer.json(), asked) == (200, ASKED, [ASKED])


def test_off_loopback_the_token_is_needed_for_either(root: Path) -> None:
    page = acting(root, [], host="192.0.2.7", open_to_read=False)
    assert page.get("/api/runs").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9000"},
        {"origin": "null"},
        {"origin": ""},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
    ],
)
def test_another_sites_page_cannot_act_through_ones_browser(root: Path, headers: dict[str, str]) -> None:
    asked: list = []
    page = acting(root, asked)
    page.get("/", params={"token": TOKEN})
    sent = {"content-type": "application/json", **headers}
    assert page.post("/api/runs/0/workers", content=b'{"rollout": 3}', headers=sent).status_code == 403
    assert asked == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"rollout": 9}', 409),
        (b'{"rollout": "3"}', 400),
        (b'{"rollout": true}', 400),
        (b'{"learner": 1}', 400),
        (b"[]", 400),
        (b"{", 400),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(root: Path, body: bytes, status: int) -> None:
    asked: list = []
    page = acting(root, asked)
    headers = {"content-type": "application/json", "authorization": f"Bearer {TOKEN}"}
    answer = page.post("/api/runs/0/workers", content=body, headers=headers)
    assert answer.status_code == status
    assert asked == []
    if status == 409:
        assert answer.text == "rollout workers: 9: must be a whole number from 1 to 8"


def test_a_dashboard_that_only_reads_cannot_be_made_to_act(root: Path) -> None:
    page = client(root, "127.0.0.1", None)
    assert [run["acts"] for run in page.get("/api/runs").json()] == [False]
    answer = page.post("/api/runs/0/workers", json=ASKED, headers={"origin": "http://127.0.0.1:8000"})
    assert (answer.status_code, answer.text) == (403, "this dashboard only reads: the run was started elsewhere")
    assert page.post("/api/runs", json={}, headers={"origin": "http://127.0.0.1:8000"}).status_code == 405
