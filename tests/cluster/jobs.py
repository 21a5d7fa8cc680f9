"""What the cluster tests read of a run."""

import json
from pathlib import Path

ITERATIONS = 12


def losses(run: Path) -> dict[int, float]:
    """iteration -> training loss."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["iteration"]: record["train/loss"] for record in records if "train/loss" in record}
