"""What does measuring cost? Step time with all metrics, and with the probe, against a run that shows nothing.

    python -m benchmarks.measuring [--rounds 5]

Whole runs of the control loop over the same workers, one of each kind a round; the median time between two learner
steps of each.
"""

import argparse
import statistics
from functools import partial

from benchmarks.common import interleave, keep, ratios, say, summary
from benchmarks.workers import Workers
from rlsys.config import load_config

CONFIG = "configs/quickstart.yaml"
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
    with Workers(load_config(CONFIG, COMMON)) as workers:
        runs = {kind: partial(step_s, workers, overrides) for kind, overrides in KINDS.items()}
        samples = interleave(runs, rounds, rotate=True)
    found = {
        "metrics_over_off": ratios(samples["metrics"], samples["off"]),
        "probe_over_off": ratios(samples["probe"], samples["off"]),
    }
    result = {name: summary(values) for name, values in {**samples, **found}.items()}
    for name, value in result.items():
        say(f"{name:<18} {value}")
    command = f"python -m benchmarks.measuring --rounds {rounds}"
    keep("measuring", command, {"samples": samples, "ratios": found, "summary": result})


def step_s(workers: Workers, overrides: list[str]) -> float:
    """Median seconds between two learner steps of one run."""
    rows = workers.train(load_config(CONFIG, [*COMMON, *overrides]))
    return statistics.median(r["throughput/step_s"] for r in rows if "reward/mean" in r and r["step"] > SETTLED)


if __name__ == "__main__":
    main()
