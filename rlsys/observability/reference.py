"""The catalogue as a page.

python -m rlsys.observability.reference > docs/metrics.md
"""

import sys
from itertools import groupby

from rlsys.observability.catalogue import CATALOGUE, PARTS, Metric

HEAD = """# Metrics

Written by `python -m rlsys.observability.reference` from the one definition of each metric. The same names stand in
`metrics.jsonl` and in TensorBoard.

A ✓ under *staleness*: also restricted to tokens (or, for sequence metrics, responses) of one staleness, as
`…/by_staleness/{staleness}`. A ✓ under *sign*: also restricted to tokens whose advantage has one sign, as
`…/by_sign/{sign}`. A metric of an empty part is null.

Prometheus has each as `ray_rlsys_…` with `_` for `/`, and with a ✓ under *sum* also its sum over steps, `…_total`.
"""


def page() -> str:
    """Markdown: one table for each first part of the names."""
    parts = {"staleness": ",".join(PARTS["by_staleness"]), "sign": ",".join(PARTS["by_sign"])}
    text = HEAD
    for place, value in parts.items():
        text = text.replace(f"{{{place}}}", f"{{{value}}}")
    for area, metrics in groupby(CATALOGUE.values(), key=lambda metric: metric.name.split("/")[0]):
        rows = "\n".join(map(_row, metrics))
        text += (
            f"\n## {area}\n\n| metric | unit | meaning | staleness | sign | sum |\n|---|---|---|---|---|---|\n{rows}\n"
        )
    return text


def _row(metric: Metric) -> str:
    marks = ("✓" if flag else "" for flag in (metric.by_staleness, metric.by_sign, metric.additive))
    meaning = metric.meaning.replace("|", r"\|")  # a bare one would end the cell
    return f"| `{metric.name}` | {metric.unit} | {meaning} | " + " | ".join(marks) + " |"


if __name__ == "__main__":
    sys.stdout.write(page())
