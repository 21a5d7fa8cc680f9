"""What setup.cfg cannot say: three folders at the top of the repository are package data, under megadsl/share/ once installed.

megadsl/config/resources.py finds them in both places. Everything else about the package is in setup.cfg.
"""

from setuptools import find_packages, setup

SHARED = {"configs": ["*.yaml"], "ds_configs": ["*.json"], "slurm": ["*.sbatch", "*.sh", "*.env", "*.md", "*.txt"]}

setup(
    packages=[*find_packages(include=["megadsl", "megadsl.*"]), *(f"megadsl.share.{name}" for name in SHARED)],
    package_dir={f"megadsl.share.{name}": name for name in SHARED},
    package_data={f"megadsl.share.{name}": patterns for name, patterns in SHARED.items()},
)
