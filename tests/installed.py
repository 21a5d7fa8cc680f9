"""The wheel of this repository in a fresh virtual environment, for tests of what a user gets who has no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


def stranger(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment variables without what leads to the repository or to the tests' own virtual environment."""
    kept = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "MEGADSL_VENV", "VIRTUAL_ENV")}
    own = str(Path(sys.executable).parent)
    return kept | {"PATH": os.pathsep.join(folder for folder in kept["PATH"].split(os.pathsep) if folder != own)}


@dataclass(frozen=True)
class Installed:
    """A virtual environment that holds the wheel."""

    wheel: Path
    environment: Path

    def run(self, *command: str, cwd: Path, status: int = 0, environment: Mapping[str, str] = os.environ) -> str:
        """A program of the virtual environment; what it printed, errors last."""
        done = subprocess.run([self.environment / "bin" / command[0], *command[1:]], cwd=cwd, env=stranger(environment),
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == status, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr


def install_wheel(folder: Path) -> Installed:
    """Build and install under `folder`. Dependencies come from the environment of the tests."""
    def python(*arguments: str | Path) -> None:
        subprocess.run([sys.executable, "-m", *arguments], check=True, timeout=120, env=stranger())

    # The sources are copied, so that an old build/ cannot lend a file, and removed before anything is run.
    leave_out = shutil.ignore_patterns(".*", "build", "runs", "tests", "*.egg-info", "__pycache__")
    sources = shutil.copytree(ROOT, folder / "sources", ignore=leave_out)
    python("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources)
    shutil.rmtree(sources)
    [wheel] = folder.glob("*.whl")
    environment = folder / "venv"
    python("venv", "--without-pip", environment)
    python("pip", "--python", environment / "bin" / "python", "install", "--quiet", "--no-deps", wheel)
    # Files named .pth are not read in a folder that one adds, so an editable megadsl of the tests' environment stays out.
    packages = next((environment / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Installed(wheel, environment)
