"""What crosses the wire when the learner and the rollout workers are two machines, and what does it cost?

    python -m benchmarks.two_nodes [--steps 60]

The machines are two network namespaces joined by a virtual cable (needs root and iproute2), with a Ray node in each.
Every row is one `rlsys train`; bytes are the kernel's count at the cable, over the whole run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import keep, say
from tests.cluster.namespaces import Cluster, lacking, two_nodes
from tests.integration.running import environment

PLACES = {
    "one node, 1 worker": {"near": 1, "far": 0},
    "two nodes, 1 worker": {"near": 0, "far": 1},
    "two nodes, 2 workers": {"near": 0, "far": 2},
}
"""Rollout workers on the learner's node and on the other one."""

FIXED = ["eval.every=0", "checkpoint.every=0", "kl.coef=0.0", "kl.reference=false", "probe.fraction=0.0"]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    if why := lacking():
        parser.error(why)
    runs = {}
    for name, workers in PLACES.items():
        with two_nodes(environment()) as cluster:
            cluster.start(**workers)
            runs[name] = measure(cluster, steps, sum(workers.values()))
        say(f"{name:<22} {runs[name]}")
    keep("two_nodes", f"python -m benchmarks.two_nodes --steps {steps}", {"runs": runs})


def measure(cluster: Cluster, steps: int, workers: int) -> dict[str, Any]:
    """One run; what its files and the cable say."""
    overrides = [f"learner.steps={steps}", f"rollout.workers={workers}", f"resources.address={cluster.address}"]
    before = cluster.near.sent, cluster.far.sent
    with tempfile.TemporaryDirectory() as scratch:
        train = ["train", "configs/quickstart.yaml", "--json", f"run_dir={scratch}", "resources.roles=true"]
        command = cluster.near.inside(sys.executable, "-m", "rlsys.cli", *train, *FIXED, *overrides)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=dict(cluster.environment))
        lines = (Path(scratch) / "quickstart" / "metrics.jsonl").read_text().splitlines()
    sent, received = cluster.near.sent - before[0], cluster.far.sent - before[1]
    rows = [json.loads(line) for line in lines]
    accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    trained = [row for row in rows if "reward/mean" in row]
    size = trained[0]["weight_sync/bytes"]
    return {
        "before": accuracy[0],
        "after": accuracy[-1],
        "version_mb": size / 1e6,
        "sent_over_version": round(sent / (steps + 1) / size, 4),
        "received_mb_per_step": round(received / steps / 1e6, 4),
        "apply_ms": round(1e3 * statistics.median(row["weight_sync/apply_s"] for row in trained), 1),
        "step_s": round(statistics.median(row["throughput/step_s"] for row in trained), 3),
        "staleness_mean": round(statistics.mean(row["staleness/mean"] for row in trained), 3),
        "violations": sum(row["staleness/violations"] for row in trained),
        "lost": trained[-1]["ledger/lost"],
    }


if __name__ == "__main__":
    main()
