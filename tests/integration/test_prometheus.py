"""A real Prometheus with our configuration scrapes a live run: dashboard and alert rules find what they ask for.

The run goes wrong on purpose, and stays so: the learning rate is far too high and rewards are noise, while the KL term
keeps the policy from settling on one answer.
"""

import json
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.running import PATIENCE_S, Running, module, program, running, steps, write_config

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the Debian package prometheus"),
]

DEPLOY = Path(__file__).parents[2] / "deploy"
WINDOW = "1m"
"""In the place of the minutes that rules and panels look back over: a run of this test lasts one."""

LIMIT = 0.6
"""The run's own limit of its ESS."""

NOISE = """
import random


def score(prompt, response) -> float:
    return random.random()
"""

Series = dict[str, Any]


@dataclass
class Server:
    """A Prometheus under way."""

    port: int
    process: Running

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of its HTTP API's answer. Raises for an expression that it cannot parse."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}?{query}", timeout=30) as answer:
            said = json.load(answer)
        assert said["status"] == "success"
        return said["data"]

    def query(self, expression: str) -> list[Series]:
        """What an expression gives now."""
        result: list[Series] = self.ask("query", query=expression)["result"]
        return result

    def answers(self) -> bool:
        """Whether it has started."""
        try:
            return bool(self.ask("status/buildinfo"))
        except OSError:
            return False

    def sees_all(self) -> bool:
        """Whether every node that it was told of has been scraped."""
        return {target["health"] for target in self.ask("targets", state="active")["activeTargets"]} == {"up"}

    def until(self, expression: str) -> list[Series]:
        """What it gives once it gives something."""
        found: list[Series] = []

        def asked() -> bool:
            found[:] = self.query(expression)
            return bool(found)

        self.process.until(asked)
        return found


@dataclass
class Live:
    """A run that goes on, and the two ways to scrape it."""

    directory: Path
    files: Server
    remote: Server


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("prometheus")
    secret = directory / "token"
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_hex(32))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(secret)}
    gcs, jobs, *ours, autoscaler, dashboard = free_ports(6)
    often = {
        "RAY_metrics_report_interval_ms": "1000",  # not every 10 s: some metrics are there for a step only
        "AUTOSCALER_METRIC_PORT": str(autoscaler),  # not the fixed ones, which another cluster may have
        "DASHBOARD_METRIC_PORT": str(dashboard),
    }
    (directory / "noise.py").write_text(NOISE)
    write_config(
        directory,
        staleness={"max": 3},
        learner={"steps": 100000, "lr": 0.03, "warmup_steps": 0, "schedule": "constant", "max_nonfinite_steps": 1000},
        kl={"coef": 0.5},
        reward={"function": "noise:score"},
        objective={"correction": "tis"},
        alarms={"ess_sequence_min": LIMIT},
        probe={"fraction": 1.0},
        eval={"every": 5, "max_prompts": 8},
        checkpoint={"every": 0},
        resources={"address": f"127.0.0.1:{gcs}", "pin_cores": False},
    )
    with ExitStack() as stack:
        # Not below `directory`: the names of Ray's sockets would become too long for the kernel.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlsys-", ignore_cleanup_errors=True)))
        head = stack.enter_context(module(directory, *head_command(gcs, jobs, scratch), **token, **often))
        head.until((scratch / "prom_metrics_service_discovery.json").exists)
        files = stack.enter_context(prometheus(directory, "prometheus.yaml", ours[0], {"/tmp/ray": str(scratch)}))
        places = {"rlsys-head-svc:8265": f"127.0.0.1:{jobs}", "/etc/prometheus/ray-token": str(secret)}
        remote = stack.enter_context(prometheus(directory, "remote.yaml", ours[1], places))
        run = stack.enter_context(running(directory, "train", "run.yaml", **token))
        run.until(lambda: len(steps(directory / "runs" / "run")) >= 3)
        yield Live(directory, files, remote)
        run.interrupt()
        assert run.finish().code == 0


def head_command(gcs: int, jobs: int, scratch: Path) -> list[str]:
    options = {
        "node-ip-address": "127.0.0.1",
        "port": gcs,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": jobs,
        "dashboard-agent-listen-port": 0,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": 2,
        "object-store-memory": 256 << 20,
        "temp-dir": scratch,
    }
    head = ["ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    return head + [f"--{name}={value}" for name, value in options.items()]


@contextmanager
def prometheus(directory: Path, name: str, port: int, places: Mapping[str, str]) -> Iterator[Server]:
    """One with our configuration, its places filled in as it says, that looks every second."""
    config = directory / Path(name).stem
    config.mkdir()
    text = (DEPLOY / "prometheus" / name).read_text()
    for place, value in places.items():
        assert place in text
        text = text.replace(place, value)
    (config / name).write_text(text.replace("_interval: 10s", "_interval: 1s"))
    (config / "alerts.yaml").write_text(impatient((DEPLOY / "prometheus" / "alerts.yaml").read_text()))
    options = {
        "config.file": config / name,
        "storage.tsdb.path": config / "data",
        "web.listen-address": f"127.0.0.1:{port}",
    }
    command = ["prometheus", *(f"--{option}={value}" for option, value in options.items())]
    with program(directory, *command) as process:
        server = Server(port, process)
        process.until(server.answers)
        yield server


def impatient(rules: str) -> str:
    """Rules that judge a minute as they would judge half an hour."""
    return re.sub(
        r"offset \d+m", "offset 10s", re.sub(r"\[\d+m\]", f"[{WINDOW}]", re.sub(r"for: \d+m", "for: 0s", rules))
    )


def free_ports(number: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


def expressions() -> dict[str, str]:
    """Every PromQL of the dashboard, for all runs, by panel and legend."""
    dashboard = json.loads((DEPLOY / "grafana" / "rlsys.json").read_text())
    found = {
        f"{panel['title']}: {target['legendFormat']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }
    found |= {annotation["name"]: annotation["expr"] for annotation in dashboard["annotations"]["list"]}
    return {name: e.replace("$run", ".*").replace("$__rate_interval", WINDOW) for name, e in found.items()}


def rules() -> dict[str, str]:
    """Every alert's expression."""
    text = impatient((DEPLOY / "prometheus" / "alerts.yaml").read_text())
    return {rule["alert"]: rule["expr"] for group in yaml.safe_load(text)["groups"] for rule in group["rules"]}


def sides(expression: str) -> list[str]:
    """What an alert's expression compares, thresholds that are numbers left out."""
    parts = re.split(r"\s(?:[<>]=?|==)\s(?:on \(run\) )?|\sand on \(run\) ", expression)
    return [part for part in parts if not re.fullmatch(r"[\d.]+", part.strip())]


def test_rules_and_configurations_are_what_prometheus_reads(tmp_path: Path) -> None:
    for command in (
        ["check", "config", "--syntax-only", "prometheus.yaml"],
        ["check", "config", "--syntax-only", "remote.yaml"],
        ["check", "rules", "alerts.yaml"],
        ["test", "rules", "alerts.test.yaml"],
    ):
        done = subprocess.run(["promtool", *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_node_that_ray_names_is_scraped(live: Live) -> None:
    for server in (live.files, live.remote):
        (step,) = server.until("max by (run) (ray_rlsys_step)")
        assert step["metric"] == {"run": "run"}
        server.process.until(server.sees_all)


def test_the_alert_fires_when_the_weights_collapse(live: Live) -> None:
    alert = 'ALERTS{alertname="RlsysEssCollapse", alertstate="firing"}'
    (firing,) = live.files.until(f"max_over_time({alert}[{WINDOW}])")
    assert (firing["metric"]["run"], firing["metric"]["severity"]) == ("run", "warning")
    lowest = min(
        value
        for row in steps(live.directory / "runs" / "run")
        for key, value in row.items()
        if key.startswith("importance/ess_sequence/by_staleness/") and value is not None
    )
    (limit,) = live.files.query('ray_rlsys_alarm_limit{alarm="ess_low"}')
    assert lowest < float(limit["value"][1]) == LIMIT
    healthy = {"RlsysStalenessViolation", "RlsysGroupsLost", "RlsysRolloutWorkersMissing", "RlsysRewardWorkersMissing"}
    fired = live.files.query(f"count by (alertname) (max_over_time(ALERTS[{WINDOW}]))")
    assert not healthy & {series["metric"]["alertname"] for series in fired}


def test_every_expression_of_the_dashboard_returns_data(live: Live) -> None:
    live.files.until('ALERTS{alertname=~"Rlsys.+", alertstate="firing"}')
    empty = wait_for_data(live.files, expressions())
    assert not empty


def test_every_rule_is_evaluated_and_compares_data(live: Live) -> None:
    compared = {f"{name}, side {i}": side for name, e in rules().items() for i, side in enumerate(sides(e))}
    assert len(compared) > len(rules())
    assert not wait_for_data(live.files, compared)
    evaluated = [rule for group in live.files.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in evaluated} == set(rules())
    assert {(rule["health"], rule.get("lastError")) for rule in evaluated} == {("ok", None)}


def test_a_mean_over_time_is_the_rate_of_two_counters(live: Live) -> None:
    """The learner's wait as Prometheus sees it against the run's own record of the same steps."""
    idle, total = "ray_rlsys_throughput_learner_idle_s_total", "ray_rlsys_throughput_step_s_total"
    live.files.until(total)

    def recorded(until: int) -> tuple[float, float]:
        rows = [row for row in steps(live.directory / "runs" / "run") if row["step"] <= until]
        return sum(r["throughput/learner_idle_s"] for r in rows), sum(r["throughput/step_s"] for r in rows)

    def agrees() -> bool:
        last = steps(live.directory / "runs" / "run")[-1]["step"]
        (waited,), (took,) = live.files.query(idle), live.files.query(total)
        seen = float(waited["value"][1]), float(took["value"][1])
        return any(seen == pytest.approx(recorded(step), rel=1e-6) for step in range(last + 1))

    live.files.process.until(agrees)


def wait_for_data(server: Server, asked: Mapping[str, str]) -> dict[str, str]:
    """Those of the expressions that return nothing, ever; a null metric's gauge may come and go."""
    missing = dict(asked)
    deadline = time.monotonic() + PATIENCE_S / 2
    while missing and time.monotonic() < deadline:
        missing = {name: expression for name, expression in missing.items() if not server.query(expression)}
        time.sleep(1)
    return missing
