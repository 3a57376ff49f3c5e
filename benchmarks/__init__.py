"""One file a question. Each prints what it measured and keeps it in `baselines/`; `report` writes RESULTS.md."""
