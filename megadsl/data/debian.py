"""Data sets that Debian packages, fetched and unpacked without rights over the system: apt-get download, dpkg -x."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from megadsl.data.atomic_files import make_folder
from megadsl.errors import UserError


def fetch_package(package: str, inside: str, output: Path) -> list[Path]:
    """Copy the files of folder `inside` of a Debian package to `output`; what is there already stays -> the files.

    Raises:
        UserError: no apt-get or dpkg on this machine, no network, or the package has no such folder.
    """
    make_folder(output)
    with tempfile.TemporaryDirectory(dir=output, prefix=".fetch-") as folder:
        _unpack(package, Path(folder), output)
        found = sorted(path for path in (Path(folder) / inside).glob("*") if path.is_file())
        if not found:
            raise UserError(f"The package {package} has no files in {inside}; it has changed since this was written.")
        return [Path(shutil.move(path, output / path.name)) for path in found]


def unpack_package(package: str, output: Path) -> None:
    """Unpack a Debian package into `output`, as it would lie under /: no dependencies, nothing installed.

    Raises:
        UserError: no apt-get or dpkg on this machine, or no network.
    """
    make_folder(output)
    _unpack(package, output, output)


def _unpack(package: str, into: Path, output: Path) -> None:
    """`output`: the folder that the user named."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise UserError(f"This machine has no apt-get to fetch the Debian package {package} with; copy its files from another one into {output}")
    with tempfile.TemporaryDirectory(dir=into, prefix=".download-") as folder:
        _run(["apt-get", "download", package], folder, f"{package} cannot be fetched; try apt-get update first, or check the network")
        [archive] = Path(folder).glob("*.deb")
        _run(["dpkg", "-x", archive.name, str(into.resolve())], folder, f"{archive.name} cannot be unpacked")


def _run(command: list[str], folder: str, wrong: str) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip()).splitlines()
        raise UserError(f"{wrong} ({' '.join(command[:2])} said: {said[-1] if said else 'nothing'}).")
