"""What a run folder says of its run: the numbers of metrics.jsonl and one line on how far it is. No torch, no SLURM."""

import json
from pathlib import Path

from megadsl.config.load import load_saved_config
from megadsl.monitor.progress import duration


def read_metrics(run_dir: Path) -> list[dict]:
    """The records of metrics.jsonl, oldest first; a last line that is being written is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def latest(metrics: list[dict], key: str) -> float | None:
    """The newest finite value of `key`; None without one."""
    return next((record[key] for record in reversed(metrics) if record.get(key) is not None), None)


def progress_line(run_dir: Path) -> str:
    """Iteration, loss, rate and the time that is left, as the run itself wrote them last."""
    metrics = read_metrics(run_dir)
    if not metrics:
        return "no iteration is recorded yet"
    config = load_saved_config(run_dir / "config.yaml")
    iteration, total = metrics[-1]["iteration"], config.training.train_iters
    words = [f"iteration {iteration}/{total}"]
    if (loss := latest(metrics, "train/loss")) is not None:
        words.append(f"loss {loss:.4f}")
    if (rate := latest(metrics, "throughput/tokens_per_second")) is not None:
        words.append(f"{rate:,.0f} tokens/s")
    if (seconds := latest(metrics, "throughput/seconds_per_iteration")) is not None:
        words.append(f"ETA {duration(seconds * (total - iteration))}")
    return " | ".join(words)
