"""Speed of the theory: profiles of 1000 layers at both levels, components, the import. Best of several runs, process time.

    OMP_NUM_THREADS=1 python benchmarks/theory_speed.py
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.schemes import build_plan
from megadsl.schemes.assemble import profile_of
from megadsl.schemes.registry import build_parametrization
from megadsl.theory import component, zipf


def best(run: Callable[[], object], repeats: int = 5) -> float:
    """Least process time in seconds of `repeats` runs after the first, which fills the caches."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def profile(level: str, layers: int, length: int) -> Callable[[], object]:
    model = ModelConfig(num_layers=layers, hidden_size=64, seq_length=length)
    parametrize, statistics = build_parametrization(model, SchemeConfig(name="dslm"), 4096), zipf(4096)
    return lambda: profile_of(parametrize, model, statistics, 4096, level)


def plan(layers: int) -> Callable[[], object]:
    model = ModelConfig(num_layers=layers, hidden_size=64, seq_length=128)
    return lambda: build_plan(model, SchemeConfig(name="dslm"), None, 4096)


def main() -> None:
    show("scalar profile, 1000 layers", best(profile("scalar", 1000, 256)), "aim: below 50")
    show("matrix profile, 1000 layers x 256 tokens", best(profile("matrix", 1000, 256), 2), "aim: below 5000")
    show("matrix profile, 1000 layers x 4096 tokens", best(profile("matrix", 1000, 4096), 2))
    for layers in (192, 1000):
        show(f"dslm plan, {layers} layers", best(plan(layers), 2))
    for mask in ("bidirectional", "causal"):
        attention = partial(component, "attention", length=512, correlation=0.2, mask=mask)
        show(f"component attention, {mask}, 512 tokens", best(attention, 2))
    code = ("import sys, time; start = time.perf_counter(); import megadsl.theory; "
            "print(time.perf_counter() - start, 'torch' in sys.modules)")
    found = [subprocess.check_output([sys.executable, "-c", code], text=True).split() for _ in range(5)]
    show("import megadsl.theory", min(float(seconds) for seconds, _ in found), f"aim: below 300; torch: {found[0][1]}")


def show(label: str, seconds: float, remark: str = "") -> None:
    print(f"{label:44s} {1e3 * seconds:8.1f} ms   {remark}")


if __name__ == "__main__":
    main()
