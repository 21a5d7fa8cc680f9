"""tools/gpu_check.py in its small form: what is kept for machines with GPUs still runs, finds what is wrong and outlives a crash."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu_check.py"


@pytest.fixture
def tool(monkeypatch):
    """The tool's modules, importable as they are for the tool itself."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import gpu_check
    from gpu_checks import machine

    return gpu_check, machine


def test_every_check_runs_on_a_cpu(tool, tmp_path):
    output = tmp_path / "found" / "rows.json"
    done = subprocess.run([sys.executable, str(TOOL), "--device", "cpu", "--output", str(output)], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    rows = found["rows"]
    assert found["machine"]["device"] == "cpu" and {row["check"] for row in rows} == set(tool[0].CHECKS)
    passed = [row for row in rows if row["passed"]]
    assert len(passed) >= 17 and not any(row["passed"] is False for row in rows)
    assert {row["measured"] for row in rows if row["wanted"].startswith("needs")} == {"not run"}
    assert "0 of" in done.stdout and str(output) in done.stdout


def test_a_check_that_crashes_is_a_row(tool, capsys):
    gpu_check, machine = tool

    def half(_):
        yield machine.Row("", "the first thing", "1", "1", True)
        raise machine.Failed("the kernel [x] is wrong")

    rows = gpu_check.run_check("mine", half, None)
    assert [(row.check, row.passed) for row in rows] == [("mine", True), ("mine", False)]
    assert "the kernel [x] is wrong" in rows[1].measured
    gpu_check.print_table(rows, "title")
    assert "FAILED" in capsys.readouterr().out


def test_a_session_says_which_command_failed(tool, tmp_path):
    _, machine = tool
    with pytest.raises(machine.Failed, match="evaluate nowhere --data x: UserError: .*nowhere"):
        machine.Session(tmp_path, "refused", [["evaluate", "nowhere", "--data", "x"], ["facts", "cpu"]], {}).results()
    after = json.loads((tmp_path / "sessions" / "refused" / "results.json").read_text())
    assert json.loads(after[1]["output"])["device"] == "cpu", "the next command of the process still ran"
    with pytest.raises(machine.Failed, match="data corpus x: the process ended with 1"):
        machine.Session(tmp_path, "killed", [["data", "corpus", "x"]], {"PYTHONHOME": str(tmp_path)}).results()


def test_a_folder_of_an_earlier_check_is_refused(tool, tmp_path, monkeypatch, capsys):
    """Its runs are finished: they would be compared as if they had just been made."""
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--keep", str(tmp_path)])
    assert tool[0].main() == 2 and f"{tmp_path} is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("values, expected, apart", [([1.0, 2.2], [1.0, 2.0], 0.1), ([1.0], [1.0, 2.0], float("inf"))])
def test_curves_are_compared_in_every_iteration(tool, values, expected, apart):
    from gpu_checks.checks import relative

    assert relative(values, expected) == pytest.approx(apart)
