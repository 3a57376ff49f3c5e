"""Does the quickstart learn, every time? Strictly synchronous, with two rollout workers, with an untied head.

    python -m benchmarks.quickstart [--seeds 0 1 2] [--variants default ...]

Each variant is `rlsys train configs/quickstart.yaml`; runs that are already kept are not repeated, so the
command continues where it was interrupted.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import BASELINES, keep, say

VARIANTS: dict[str, list[str]] = {
    "default": [],
    "staleness.max=0": ["staleness.max=0"],
    "rollout.workers=2": ["rollout.workers=2"],
    "untied": ["model.tiny.tie_embeddings=false"],
}


def main() -> None:
    """Run what is missing, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--name", default="quickstart")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    path = BASELINES / f"{arguments.name}.json"
    runs: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    for variant in arguments.variants:
        for seed in arguments.seeds:
            key = f"{variant}, seed {seed}"
            if key not in runs:
                runs[key] = run(arguments.config, [*VARIANTS[variant], f"seed={seed}"])
                keep(arguments.name, command(arguments.name, arguments.config, runs), {"runs": runs})
            say(f"{key:<28} {runs[key]}")


def command(name: str, config: str, runs: Mapping[str, Any]) -> str:
    """The command that gives these runs."""
    variants = [variant for variant in VARIANTS if any(key.startswith(f"{variant}, ") for key in runs)]
    chosen = f" --variants {' '.join(variants)}" if variants != list(VARIANTS) else ""
    return f"python -m benchmarks.quickstart --name {name} --config {config}{chosen}"


def run(config: str, overrides: list[str]) -> dict[str, Any]:
    """One run by the command line; what it came to, read from its own files."""
    scratch = Path(tempfile.mkdtemp())
    start = time.perf_counter()
    train = [sys.executable, "-m", "rlsys.cli", "train", config, "--json", f"run_dir={scratch}", *overrides]
    output = subprocess.run(train, check=True, stdout=subprocess.PIPE, text=True).stdout
    wall = time.perf_counter() - start
    result = json.loads(output)
    rows = [json.loads(line) for line in (Path(result["directory"]) / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/mean" in row]
    accuracy = {int(version): value for version, value in result["accuracy"].items()}
    shutil.rmtree(scratch)
    return {
        "before": accuracy[min(accuracy)],
        "after": accuracy[max(accuracy)],
        "steps": result["version"],
        "rl_s": round(rows[-1]["time"] - rows[0]["time"], 1),
        "wall_s": round(wall, 1),
        "staleness_mean": round(sum(s["staleness/mean"] for s in steps) / len(steps), 3),
        "staleness_max": max(s["staleness/max"] for s in steps),
        "violations": sum(s["staleness/violations"] for s in steps),
        "lost": steps[-1]["ledger/lost"],
        "pause_fraction": round(  # of a worker's time
            sum(s["weight_sync/pause_s"] / s["workers/rollout/ready"] for s in steps)
            / sum(s["throughput/step_s"] for s in steps),
            5,
        ),
    }


if __name__ == "__main__":
    main()
