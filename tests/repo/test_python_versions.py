"""setup.cfg, constraints.txt and tools/check_python_versions.py say the same of Python's and the dependencies' versions."""

import configparser
import re
import runpy

from installed import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

TOOL = runpy.run_path(str(ROOT / "tools" / "check_python_versions.py"))


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_tool_asks_for_the_pythons_that_setup_cfg_names():
    metadata = setup_cfg()
    classified = re.findall(r"Python :: (3\.\d+)", metadata["metadata"]["classifiers"])
    allowed = SpecifierSet(metadata["options"]["python_requires"])
    assert classified == TOOL["PYTHONS"] == [f"3.{minor}" for minor in range(30) if f"3.{minor}" in allowed]


def test_every_dependency_is_pinned_within_its_bounds():
    options = setup_cfg()
    # The README's commands install these; what they do not install (wandb) has no version that was run together with the rest.
    extras = [options["options.extras_require"][name] for name in ("hf", "dev")]
    required = [options["options"]["install_requires"], *extras]
    pinned = {pin.name.lower(): pin for pin in TOOL["pins"]((ROOT / "constraints.txt").read_text())}
    for wanted in (requirement for text in required for requirement in TOOL["pins"](text)):
        if wanted.name != "setuptools":  # it comes with Python or a build; pip freeze leaves it out
            [exact] = pinned[wanted.name].specifier
            assert exact.operator == "==" and exact.version in wanted.specifier, wanted


def test_the_table_shows_what_is_not_a_wheel_everywhere():
    answers = {Requirement("a==1"): ["wheel", "wheel"], Requirement("b==2"): ["wheel", "MISSING"], Requirement("c==3"): ["source", "source"]}
    header, *rows = [re.split(" {2,}", line) for line in TOOL["table"](answers, ["3.12", "3.13"])]
    assert header == ["pin", "Python 3.12", "Python 3.13"]
    assert rows == [["b==2", "wheel", "MISSING"], ["c==3", "source", "source"], ["all 3 pins", "2 wheels", "1 wheels"]]
