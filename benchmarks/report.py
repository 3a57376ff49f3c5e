"""Write RESULTS.md from the kept baselines.

python -m benchmarks.report
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import staleness
from benchmarks.common import BASELINES

TARGET = Path(__file__).parent / "RESULTS.md"

NOTES = {
    "rollout_over_bare": "tokens/s through the rollout actor ÷ the engine driven bare",
    "one_over_bare": "tokens/s through one rollout actor ÷ one bare engine",
    "two_over_bare": "tokens/s through two rollout actors ÷ two bare engines",
    "pipeline_over_limit": "responses/s of the pipeline ÷ min(rollout alone, learner alone)",
    "learner_idle_fraction": "share of a step the learner waits for a batch",
    "sampled_over_learned": "responses/s of rollout alone ÷ learner alone: how rollout is provisioned",
    "learner_between_steps": "share of a step in which the learner actor neither trained nor published",
    "pause_fraction": "share of a worker's time in which decoding stood still for weight syncs",
    "apply_over_memcpy": "swapping a version in ÷ copying its bytes",
    "metrics_over_off": "step time with every metric and record, without the probe ÷ with none",
    "probe_over_off": "step time with the default probe too ÷ with none",
    "verify_and_apply_over_memcpy": "verifying the checksum and swapping ÷ copying its bytes",
}


def main() -> None:
    """Read every baseline, write the page."""
    parts = ["# Results", "", "Written by `python -m benchmarks.report` from `benchmarks/baselines/*.json`.", ""]
    for path in sorted(BASELINES.glob("*.json")):
        kept = json.loads(path.read_text())
        parts += [f"## {path.stem}", "", f"`{kept['command']}`", "", _environment(kept["environment"]), ""]
        if path.stem == "staleness":
            parts += [*staleness.table(kept["runs"]), "", "![staleness](../docs/assets/staleness.png)"]
        else:
            parts += _runs(kept["runs"]) if "runs" in kept else _ratios(kept)
        parts.append("")
    TARGET.write_text("\n".join(parts).rstrip() + "\n")


def _environment(environment: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in environment.items())


def _runs(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = list(next(iter(runs.values())))
    lines = ["| run | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return lines + [f"| {name} | " + " | ".join(_number(run[c]) for c in columns) + " |" for name, run in runs.items()]


def _ratios(kept: Mapping[str, Any]) -> list[str]:
    lines = ["| measured | median | min | max | n | |", "|---|---|---|---|---|---|"]
    for name, value in kept["summary"].items():
        numbers = " | ".join(_number(value[k]) for k in ("median", "min", "max", "n"))
        lines.append(f"| {name} | {numbers} | {NOTES.get(name, '')} |")
    return lines


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
