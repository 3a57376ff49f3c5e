"""What does measuring cost? Step time with all metrics, and with the probe, against a run that shows nothing.

    python -m benchmarks.measuring [--rounds 5]

Whole runs by the command line, one of each kind a round; the median time between two learner steps of each.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import interleave, keep, ratios, say, summary

COMMON = ["learner.steps=50", "eval.every=0", "eval.max_prompts=8", "checkpoint.every=0"]
OFF = [
    "probe.fraction=0.0",
    "observability.prometheus=false",
    "observability.trace=false",
    "records.tensorboard=false",
    "records.rollouts_every=0",
]
KINDS: dict[str, list[str]] = {"off": OFF, "metrics": ["probe.fraction=0.0"], "probe": []}
SETTLED = 10
"""Steps before the queue is full."""


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    samples = interleave({kind: lambda o=overrides: step_s(o) for kind, overrides in KINDS.items()}, rounds)  # type: ignore[misc]
    found = {
        "metrics_over_off": ratios(samples["metrics"], samples["off"]),
        "probe_over_off": ratios(samples["probe"], samples["off"]),
    }
    result = {name: summary(values) for name, values in {**samples, **found}.items()}
    for name, value in result.items():
        say(f"{name:<18} {value}")
    command = f"python -m benchmarks.measuring --rounds {rounds}"
    keep("measuring", command, {"samples": samples, "ratios": found, "summary": result})


def step_s(overrides: list[str]) -> float:
    """Median seconds between two learner steps of one run."""
    scratch = Path(tempfile.mkdtemp())
    train = [sys.executable, "-m", "rlsys.cli", "train", "configs/quickstart.yaml", "--json", f"run_dir={scratch}"]
    subprocess.run([*train, *COMMON, *overrides], check=True, stdout=subprocess.DEVNULL)
    lines = (scratch / "quickstart" / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(scratch)
    rows = [row for row in map(json.loads, lines) if "reward/mean" in row]
    return statistics.median(row["throughput/step_s"] for row in rows if row["step"] > SETTLED)


if __name__ == "__main__":
    main()
