"""Starting a command: what a verb imports, and that one process needs no port."""

import ast
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import run_ranks

from megadsl.config import save_config

PACKAGE = Path(__file__).parents[2] / "megadsl"
# DeepSpeed trains; transformers exports; Inductor (with Dynamo) compiles for a GPU: seconds of import each or nearly.
HEAVY = {"deepspeed", "transformers", "torch._inductor.compile_fx", "matplotlib"}
CALL = """
import json, sys
from megadsl.cli.main import app
app(sys.argv[1:], standalone_mode=False)
print(json.dumps(list(sys.modules)))
"""


def modules_after(*arguments: str) -> set[str]:
    """Run a verb in a process of its own; the names of all modules that it has imported by its end."""
    command = [sys.executable, "-W", "ignore", "-c", CALL, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("startup")
    config = small_data.config(folder / "run", training={"train_iters": 1, "eval_iters": 0}, parallel={"zero_stage": 1})
    save_config(config, folder / "config.yaml")
    modules = modules_after("train", folder / "config.yaml")
    assert "deepspeed" in modules, "else the tests below prove nothing"
    assert not {"transformers", "matplotlib", "torch._inductor.compile_fx"} & modules
    return folder / "run"


def test_generate_imports_what_it_needs(run):
    modules = modules_after("generate", run, "--prompt", "def ", "--max-new-tokens", "2")
    assert "megatron.core" in modules and not modules & HEAVY


def test_evaluate_imports_what_it_needs(run, small_data):
    modules = modules_after("evaluate", run, "--data", small_data.dataset, "--max-tokens", "200")
    assert "megatron.core" in modules and not modules & HEAVY


def test_plan_measure_imports_what_it_needs(run):
    modules = modules_after("plan", run / "config.yaml", "--measure", "1")
    assert "megatron.core" in modules and not modules & HEAVY


@pytest.mark.parametrize("verb", ["evaluate", "train", "plan", "doctor"])
def test_help_imports_no_torch(verb):
    code = f"""
import sys
from megadsl.cli.main import app
app(["{verb}", "--help"], standalone_mode=False)
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{verb} --help imports torch\n{done.stderr}"


def bodies(path: Path) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            yield body


def imported(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.ImportFrom):
        return {statement.module or ""}
    return {alias.name for alias in statement.names} if isinstance(statement, ast.Import) else set()


FIRST = "megadsl.parallel.device"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_whoever_imports_megatron_core_defers_its_compiler(path):
    """parallel/device.py is imported before it in the same block; for model/ its __init__.py has done so."""
    if path in (PACKAGE / "parallel" / "device.py", *(PACKAGE / "model").glob("*.py")):
        assert path.parent.name == "parallel" or any(FIRST in imported(line) for line in next(bodies(PACKAGE / "model" / "__init__.py")))
        return
    for body in bodies(path):
        ready = False
        for statement in body:
            ready |= FIRST in imported(statement)
            if any(name.split(".")[0] == "megatron" for name in imported(statement)):
                assert ready, f"line {statement.lineno}: import {FIRST} before Megatron-core (that file says why)"


def test_what_megatron_compiles_is_compiled_at_its_first_call():
    """Once, with its arguments and its docstring kept. What compiles here only counts: a compiler is not this test's matter."""
    import torch

    from megadsl.parallel.device import _compilation_deferred

    compiled = []

    def counting(function):
        compiled.append(function.__name__)
        return function

    real, torch.compile = torch.compile, counting
    try:
        with _compilation_deferred():
            @torch.compile
            def double(x, *, times=2):
                """Twice."""
                return x * times
    finally:
        torch.compile = real
    assert not compiled and double.__doc__ == "Twice."
    assert double(3) == 6 and double(3, times=3) == 9 and compiled == ["double"]


def _join_where_the_port_is_taken() -> float:
    import torch
    import torch.distributed as dist

    from megadsl.parallel.device import prepare_device
    from megadsl.parallel.groups import data_group, destroy_groups, initialize_groups, join_deepspeed
    from megadsl.parallel.launch import discover_launch
    from megadsl.parallel.topology import Topology

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        os.environ["MASTER_PORT"] = str(taken.getsockname()[1])
        device = prepare_device("cpu")
        initialize_groups(discover_launch(), Topology(1, 1, 1), device)
        join_deepspeed(device)
        value = torch.ones(3)
        dist.all_reduce(value, group=data_group())
        gathered = [None]
        dist.all_gather_object(gathered, "here")
        destroy_groups()
    assert gathered == ["here"]
    return float(value.sum())


def test_one_process_needs_no_port():
    assert run_ranks(1, _join_where_the_port_is_taken, timeout=60) == [3.0]
