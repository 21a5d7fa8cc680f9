"""One process of tools/gpu_check.py: runs megadsl commands one after the other, as `megadsl` itself would, and notes what each gave.

    PYTHONPATH=tools python -m gpu_checks.session JOBS.json RESULTS.json

JOBS.json is a list of command lines (lists of words); besides megadsl's verbs there are `facts DEVICE` (what the machine is),
`speed DEVICE JSON` (speed.py) and `attention DEVICE JSON` (attention.py). After every command RESULTS.json is written anew, a list
of {"output", "error", "seconds"}: what a crash leaves behind is what was done. One process takes one device, chosen by its first
command.
"""

import contextlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path

from gpu_checks.machine import LAUNCHER


def facts(device: str) -> str:
    """The machine as JSON: device, count, memory in GiB, libraries."""
    import torch

    from megadsl.parallel.device import prepare_device

    found = {"torch": torch.__version__, "processors": os.cpu_count(), "device": prepare_device(device).type, "count": 1, "name": "CPU"}
    if found["device"] == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "count": torch.cuda.device_count(), "name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())), "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    return json.dumps(found)


def execute(words: list[str]) -> None:
    """Run one command line; prints what it prints."""
    if words[0] == "facts":
        print(facts(words[1]))
    elif words[0] == "speed":
        from gpu_checks.speed import measure

        print(json.dumps(measure(words[1], **json.loads(words[2]))))
    elif words[0] == "attention":
        from gpu_checks.attention import compare

        print(json.dumps(compare(words[1], **json.loads(words[2]))))
    else:
        from megadsl.cli.main import app

        app(words, standalone_mode=False)


def clean_up(variables: dict[str, str]) -> None:
    """Leave nothing of a command to the next one: its process groups, its rank, its memory."""
    if "torch" not in sys.modules:
        return
    import torch

    if torch.distributed.is_initialized():
        from megadsl.parallel.groups import destroy_groups

        destroy_groups()
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.environ.update(variables)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run(jobs: list[list[str]], results_path: Path) -> None:
    variables = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    results = []
    for words in jobs:
        printed, error, begun = io.StringIO(), None, time.perf_counter()
        try:
            with contextlib.redirect_stdout(printed):
                execute(words)
        except BaseException as problem:  # SystemExit too: whatever ends a command is its result, the next one still runs
            traceback.print_exc()
            error = f"{type(problem).__name__}: {problem}"
        results.append({"output": printed.getvalue(), "error": error, "seconds": time.perf_counter() - begun})
        results_path.write_text(json.dumps(results), encoding="utf-8")
        clean_up(variables)


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
