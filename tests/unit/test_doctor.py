"""megadsl doctor: one table for all ranks, and each check fails where the thing it checks is broken."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from ranks import free_port, run_ranks

from megadsl.parallel.checks import file_system, installation
from megadsl.parallel.checks.findings import Finding, Ranks
from megadsl.parallel.checks.survey import merge
from megadsl.parallel.launch import Launch, discover_launch

BIN = Path(sys.executable).parent
CPU = torch.device("cpu")


def test_two_processes_print_one_table(tmp_path):
    """With far more threads than cores: that is the one thing wrong, and the exit code says so."""
    command = [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "megadsl", "doctor", "--folder", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "500", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1, done.stderr
    table = dict(re.findall(r"^(?:ok|WRONG) +(\S+(?: \S+)*)  +(.*)$", done.stdout, flags=re.M))
    assert len(table) == done.stdout.count("\nok ") + done.stdout.count("\nWRONG ") + 1, "each line once"
    assert "2 processes" in table["ranks"] and "torchrun" in table["ranks"]
    assert re.findall(r"WRONG +(\S+)", done.stdout) == ["CPU"] and "set OMP_NUM_THREADS=" in done.stdout
    sweep = {name: float(re.match(r"([\d,]+) us", text)[1].replace(",", "")) for name, text in table.items() if name.startswith("all-reduce")}
    assert len(sweep) == 4 and sweep["all-reduce 16 MiB"] > sweep["all-reduce 8 B"] > 0
    assert "atomic in" in table["rename"] and "one winner" in table["exclusive creation"]
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_requirements_are_met_here_and_a_conflict_is_found(monkeypatch):
    assert not list(installation.requirement_conflicts("megadsl"))
    real = installation.metadata.requires
    monkeypatch.setattr(installation.metadata, "requires", lambda name: ["torch<1; python_version > '3'"] if name == "deepspeed" else real(name))
    assert list(installation.requirement_conflicts("megadsl")) == [("deepspeed", "torch<1", torch.__version__)]


def test_a_rename_that_is_not_atomic_is_found(tmp_path, monkeypatch):
    ranks = Ranks(Launch.alone(), CPU)
    assert not any(finding.problem for finding in file_system.check_file_system(tmp_path, ranks))

    def copy_slowly(source, target):
        content = Path(source).read_bytes()
        with open(target, "wb", buffering=0) as file:
            file.write(content[:1000])
            file.write(content[1000:])

    monkeypatch.setattr(file_system.os, "replace", copy_slowly)
    wrong = [finding for finding in file_system.check_file_system(tmp_path, ranks) if finding.problem]
    assert [finding.topic for finding in wrong] == ["rename"] and "torn" in wrong[0].problem


def _check_own_folder(folder: Path) -> list:
    ranks = Ranks(discover_launch(), CPU)
    (folder / str(ranks.rank)).mkdir()
    try:
        return file_system.check_file_system(folder / str(ranks.rank), ranks)
    finally:
        ranks.close()


def test_a_folder_that_is_not_shared_is_found(tmp_path):
    first, second = run_ranks(2, _check_own_folder, tmp_path, timeout=60)
    assert "rank(s) [1] do not see" in first[0].problem and first[0].problem == second[0].problem


def test_nodes_with_other_versions_are_found():
    same, other = Finding("torch", "2.13.0"), Finding("torch", "2.12.0")
    assert merge([("n0", [same]), ("n1", [same]), ("n1", [])], []) == [("", same)]
    table = merge([("n0", [same]), ("n1", [other])], [])
    assert table[:2] == [("n0", same), ("n1", other)] and "torch differ between nodes" in table[2][1].problem
