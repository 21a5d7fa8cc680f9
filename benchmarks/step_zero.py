"""Measured over planned at step 0 of the example configs, in every layout, through `megadsl train` itself.

    python benchmarks/step_zero.py [--seeds 6] [--configs decoder-192 ...]

For each config and (tensor, pipeline) = (1, 1), (2, 1), (1, 2): one training step for every seed, and of signal.jsonl's record of step 0 the
forward second moment over the plan's, averaged over seeds, smallest and largest of all depths; and how far the layouts' numbers of
one seed are apart. The seed also draws the order of the data. Needs runs/demo (of `make train`).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from megadsl.config import load_config
from megadsl.monitor.signal import SignalHistory, predicted
from megadsl.tasks.planning import plan_for_run
from megadsl.tasks.registry import resolved

CONFIGS = ("decoder-192", "encoder-192", "encoder-192-post", "encoder_decoder-96")
LAYOUTS = ((1, 1), (2, 1), (1, 2))
QUANTITY = "forward_second_moment"
ROOT = Path(__file__).parents[1]


def step_zero(config: str, layout: tuple[int, int], seed: int, folder: Path) -> np.ndarray:
    """The measured second moment of step 0, [points]."""
    tensor, pipeline = layout
    run_dir = folder / f"{config}-{tensor}-{pipeline}-{seed}"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(tensor * pipeline), "-m", "megadsl", "train",
        f"configs/{config}.yaml", f"training.run_dir={run_dir}", f"training.seed={seed}", "training.train_iters=1", "training.eval_interval=0",
        "training.global_batch_size=4", "optimizer.lr_warmup_iters=0", "monitor.tensorboard=false",
        f"parallel.tensor_model_parallel_size={tensor}", f"parallel.pipeline_model_parallel_size={pipeline}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return SignalHistory.read(run_dir / "signal.jsonl").records[0].values[QUANTITY]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    arguments = parser.parse_args()
    for name in arguments.configs:
        planned = predicted(plan_for_run(resolved(load_config(ROOT / "configs" / f"{name}.yaml", []))), QUANTITY)
        measured = {}
        for layout in LAYOUTS:
            with tempfile.TemporaryDirectory() as folder:
                measured[layout] = np.array([step_zero(name, layout, seed, Path(folder)) for seed in range(1, arguments.seeds + 1)])
            mean = measured[layout].mean(axis=0) / planned
            apart = np.abs(measured[layout] / measured[LAYOUTS[0]] - 1).max()
            print(json.dumps({"config": name, "tensor": layout[0], "pipeline": layout[1], "seeds": arguments.seeds, "smallest": round(mean.min(), 4),
                              "largest": round(mean.max(), 4), "furthest from (1, 1)": float(f"{apart:.1e}")}), flush=True)


if __name__ == "__main__":
    main()
