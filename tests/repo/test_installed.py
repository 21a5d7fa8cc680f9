"""What `pip wheel .` makes is the whole product: installed in a fresh environment, used from a folder that is not the repository.
Under SLURM: tests/cluster/test_submit_installed.py.
"""

import os
from pathlib import Path
from zipfile import ZipFile

import pytest
from installed import ROOT, Installed, install_wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    return install_wheel(tmp_path_factory.mktemp("installed"))


@pytest.mark.parametrize("name", ["configs", "ds_configs", "slurm"])
def test_every_shared_file_comes_along(installed, name):
    files = {path.name: path.read_bytes() for path in (ROOT / name).iterdir()}
    with ZipFile(installed.wheel) as wheel:
        start = f"megadsl/share/{name}/"
        assert {entry.removeprefix(start): wheel.read(entry) for entry in wheel.namelist() if entry.startswith(start)} == files


def test_every_module_comes_along(installed):
    with ZipFile(installed.wheel) as wheel:
        shipped = {entry for entry in wheel.namelist() if entry.endswith(".py")}
    assert shipped == {path.relative_to(ROOT).as_posix() for path in (ROOT / "megadsl").rglob("*.py")}


def test_a_config_of_ones_own_from_example_to_evaluation(installed, small_data, tmp_path):
    def megadsl(*arguments: str) -> str:
        return installed.run("megadsl", *arguments, cwd=tmp_path)

    where = installed.run("python", "-c", "import megadsl; print(megadsl.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.environment)
    (tmp_path / "mine.yaml").write_text(megadsl("config", "show", "decoder-192"))
    mine = ["mine.yaml", f"tokenizer.model={small_data.tokenizer}", f"data.datasets=[{small_data.dataset}]", "model.num_layers=4",
            "model.seq_length=32", "training.train_iters=2", "training.eval_interval=0", "training.run_dir=run",
            "optimizer.lr_warmup_iters=1", "parallel.zero_stage=2", "monitor.log_interval=1"]
    assert "lambda" in megadsl("plan", *mine)
    assert "iteration 2/2" in megadsl("train", *mine)
    assert "nats per token" in megadsl("evaluate", "run", "--data", str(small_data.dataset), "--max-tokens", "200")

    script = megadsl("slurm", "submit", *mine, "--nodes", "2", "--dry-run")
    scripts = Path(megadsl("slurm", "scripts").strip())
    assert scripts.is_relative_to(installed.environment) and os.access(scripts / "local_cluster.sh", os.X_OK)
    assert f"MEGADSL_SLURM={scripts}\nMEGADSL_VENV=${{MEGADSL_VENV:-{installed.environment}}}\n" in script


def test_examples_are_listed_and_a_wrong_name_is_a_sentence(installed, tmp_path):
    listed = installed.run("megadsl", "config", "list", cwd=tmp_path)
    names = {path.stem for path in (ROOT / "configs").iterdir()}
    assert {line.split()[0] for line in listed.splitlines()} == names and "#" not in listed
    assert installed.run("python", "-m", "megadsl", "config", "show", cwd=tmp_path) == listed
    said = installed.run("megadsl", "config", "show", "decoder-129", cwd=tmp_path, status=2)
    assert said.startswith("megadsl: There is no example config decoder-129 (did you mean decoder-192")
    assert "megadsl config list" in installed.run("megadsl", "plan", "configs/decoder-192.yaml", cwd=tmp_path, status=2)
