"""Does every part of the split move for its own reason, and for that alone?

    python -m benchmarks.split

Real runs of the quickstart's model, each made so that one thing pushes the ratio away from 1; every token is probed.
What a part measures where nothing pushes it is the numerical floor.

    synchronous            staleness.max=0, one update a batch, float32 on both sides   nothing
    engine                 the same with a bfloat16 engine                              engine
    drift                  the same with four mini-batch updates a batch                drift
    lag                    a queue four batches deep                                    lag
    updates, recomputed    updates in mid-response, the KV cache computed anew          lag
    updates, kept          updates in mid-response, the KV cache kept                   lag, and engine in later spans
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import BASELINES, keep, say

CONFIG = "configs/quickstart.yaml"
COMMON = [
    "probe.fraction=1.0",
    "learner.steps=16",
    "learner.schedule=constant",
    "learner.warmup_steps=1",
    "eval.every=0",
    "eval.max_prompts=8",
    "checkpoint.every=0",
    "records.rollouts_every=0",
    "task.digits=4",
    "rollout.max_new_tokens=8",
    "model.warmstart.steps=600",
]
SYNCHRONOUS = ["staleness.max=0"]
QUEUE = ["staleness.max=4", "staleness.serving_lag=0", "staleness.backlog=4"]
CASES: dict[str, list[str]] = {
    "synchronous": SYNCHRONOUS,
    "engine": [*SYNCHRONOUS, "rollout.dtype=bfloat16"],
    "drift": [*SYNCHRONOUS, "learner.updates_per_batch=4"],
    "lag": QUEUE,
    "updates, recomputed": ["rollout.reset_kv_on_update=true"],
    "updates, kept": [],
}
PARTS = ("drift", "lag", "engine", "engine_later_spans")
FILLED = 8
"""Steps after which the queue is as deep as it gets."""


def main() -> None:
    """Run what is missing, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    path = BASELINES / "split.json"
    runs: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    for case, overrides in CASES.items():
        if case not in runs:
            runs[case] = run(overrides)
            keep("split", "python -m benchmarks.split", {"runs": runs})
        say(f"{case:<20} {runs[case]}")


def run(overrides: list[str]) -> dict[str, Any]:
    """One run by the command line: mean |part| of the log-ratio over its later steps, nats a token."""
    scratch = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "rlsys.cli", "train", CONFIG, "--json", f"run_dir={scratch}", *COMMON, *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (scratch / "quickstart" / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(scratch)
    rows = [row for row in map(json.loads, lines) if row.get("split/tokens") and row["step"] > FILLED]
    found: dict[str, Any] = {}
    for part in PARTS:
        values = [v for row in rows if (v := row[f"split/{part}/abs_mean"]) is not None]
        found[part] = statistics.mean(values) if values else None
    return {
        **found,
        "staleness": statistics.mean(row["staleness/mean"] for row in rows),
        "later_tokens": statistics.mean(row["split/later_tokens"] / row["split/tokens"] for row in rows),
        "steps": len(rows),
    }


if __name__ == "__main__":
    main()
