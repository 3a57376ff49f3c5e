"""Which cluster is meant, and what is said when it cannot be reached."""

from pathlib import Path

import pytest

from rlsys.control.access import Access, choose_access, explain
from rlsys.control.local_cluster import Born, LocalCluster
from rlsys.errors import ClusterError, ConfigError

LOCAL = LocalCluster(
    address="127.0.0.1:7001",
    jobs="http://127.0.0.1:7002",
    token=Path("/state/token"),
    scratch=Path("/tmp/x"),
    processes=(Born(pid=1, ticks=0, boot=""),),
)


class AuthenticationError(Exception):
    """Ray's, by its name."""


@pytest.mark.parametrize(
    ("given", "jobs", "ray"),
    [
        ("http://head:8265", "http://head:8265", "ray://head:10001"),
        ("https://head/ray", "https://head/ray", "ray://head:10001"),
        ("ray://head:20001", "http://head:8265", "ray://head:20001"),
        ("head:6379", "head:6379", "head:6379"),
        ("http://[::1]:8265", "http://[::1]:8265", "ray://[::1]:10001"),
        ("auto", "auto", "auto"),
    ],
)
def test_an_address_leads_to_both_doors(given: str, jobs: str, ray: str) -> None:
    assert choose_access(given, {}, None) == Access(jobs=jobs, ray=ray)


def test_an_address_wins_over_the_environment_and_that_over_the_cluster_of_up() -> None:
    environment = {"RAY_ADDRESS": "there:6379"}
    assert choose_access("head:6379", environment, LOCAL).ray == "head:6379"
    assert choose_access(None, environment, LOCAL).ray == "there:6379"
    assert choose_access("auto", environment, LOCAL).ray == "there:6379"
    assert choose_access(None, {}, LOCAL) == choose_access("auto", {}, LOCAL)
    assert choose_access(None, {}, LOCAL).local is LOCAL


@pytest.mark.parametrize(
    "given", ["127.0.0.1:7001", "localhost:7001", "http://localhost:7002/", "http://127.0.0.1:7002"]
)
def test_the_cluster_of_up_is_known_by_each_of_its_addresses(given: str) -> None:
    assert choose_access(given, {}, LOCAL) == Access(jobs=LOCAL.jobs, ray=LOCAL.address, local=LOCAL)


def test_another_port_of_this_machine_is_another_cluster() -> None:
    assert choose_access("127.0.0.1:7003", {}, LOCAL).local is None


def test_without_any_cluster_it_is_said_how_to_name_one() -> None:
    with pytest.raises(ClusterError, match=r"--address, set RAY_ADDRESS, or .* `rlsys up`"):
        choose_access(None, {}, None)


@pytest.mark.parametrize("given", ["head", "ftp://head:21", "http://", "head:port", "head:99999"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"is no address of a Ray cluster.*expected http://HOST:8265"):
        choose_access(given, {}, None)


@pytest.mark.parametrize(
    ("environment", "text", "said"),
    [
        ({}, "Unauthorized: Missing authentication token", "it asks for a token, and none was sent"),
        ({"RAY_AUTH_TOKEN": "x"}, "Unauthorized", "it asks for a token, and none was sent"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, "Forbidden", "the token in RAY_AUTH_TOKEN is not"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/t"}, "Forbidden", "the token in /t is not this cluster's"),
        ({"RAY_AUTH_MODE": "token"}, "Forbidden", "the token in ~/.ray/auth_token is not this cluster's"),
        ({"RAY_AUTH_MODE": "token"}, "no authentication token was found", "none was sent"),
    ],
)
def test_a_refusal_says_whether_the_token_is_missing_or_wrong(
    environment: dict[str, str], text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told = explain(AuthenticationError(text), "http://head:8265")
    assert told.startswith("http://head:8265 refused us: ")
    assert said in told


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("nothing answers at head:6379 (refused)"), "nothing answers at head:6379 (refused). Is the"),
        (ConnectionError("ray client connection timeout"), "head:6379: ray client connection timeout. Is the cluster"),
        (ValueError("Couldn't obtain the API server address from GCS."), "this cluster has no job server"),
        (RuntimeError("Version check returned 404. Please"), "this cluster has no job server"),
        (Exception("status = StatusCode.UNAVAILABLE"), "does not answer as the head of a Ray cluster does"),
        (OSError("odd"), "head:6379: OSError: odd"),
    ],
)
def test_other_failures_say_where_to_look(error: Exception, said: str) -> None:
    assert said in explain(error, "head:6379")
