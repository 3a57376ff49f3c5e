"""Measuring on noisy machines: alternate what is compared, quote medians and ratios, keep every sample."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

BASELINES = Path(__file__).parent / "baselines"


def interleave(
    measurements: Mapping[str, Callable[[], float]], rounds: int, *, rotate: bool = False
) -> dict[str, list[float]]:
    """Call every measurement once a round, after one round that does not count.

    `rotate`: each round begins with another one, so that none gains by its place.
    """
    samples: dict[str, list[float]] = {name: [] for name in measurements}
    for round_ in range(rounds + 1):
        first = round_ % len(measurements) if rotate else 0
        order = [*measurements][first:] + [*measurements][:first]
        for name in order:
            value = measurements[name]()
            if round_:
                samples[name].append(value)
        say(f"round {round_}/{rounds}  " + "  ".join(f"{n} {v[-1]:.4g}" for n, v in samples.items() if v))
    return samples


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Ratio round by round: a machine that slows down slows both."""
    return [a / b for a, b in zip(above, below, strict=True)]


def summary(samples: list[float]) -> dict[str, float]:
    """Median, extremes and count."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples), "n": len(samples)}


def keep(name: str, command: str, result: Mapping[str, Any]) -> None:
    """Write a baseline, with where it was measured."""
    BASELINES.mkdir(exist_ok=True)
    environment = {
        "cpus": os.cpu_count(),  # of the machine: whoever measures may have pinned itself
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "ray", "transformers")},
    }
    path = BASELINES / f"{name}.json"
    path.write_text(json.dumps({"command": command, "environment": environment, **result}, indent=1) + "\n")
    say(f"kept in benchmarks/baselines/{path.name}")


def say(message: str) -> None:
    """A line of progress."""
    sys.stderr.write(message + "\n")
