"""What is installed: versions, requirements, and DeepSpeed's operators that could be compiled."""

import platform
import shutil
from collections.abc import Iterator
from importlib import metadata

import torch

from megadsl.parallel.checks.findings import Finding
from megadsl.parallel.device import prepare_deepspeed

LIBRARIES = ("torch", "deepspeed", "megatron-core", "sentencepiece", "numpy", "mpi4py", "pydantic", "tensorboard")


def check_versions() -> Iterator[Finding]:
    """Of Python and the libraries, and whether the requirements of megadsl and of all that it needs are met."""
    yield Finding("python", platform.python_version())
    for library in LIBRARIES:
        yield Finding(library, _version(library) or "not installed")
    conflicts = sorted(requirement_conflicts("megadsl"))
    if conflicts:
        wanted = " ".join(f"'{requirement}'" for _, requirement, _ in conflicts)
        for owner, requirement, version in conflicts:
            yield Finding("requirements", f"{owner} wants {requirement}", f"{version or 'nothing'} is installed; pip install {wanted}")
    else:
        yield Finding("requirements", "those of megadsl and of all that it needs are met")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirement_conflicts(root: str) -> Iterator[tuple[str, str, str | None]]:
    """(owner, requirement, installed version) of every requirement that is not met, through all dependencies of `root`."""
    from packaging.requirements import Requirement

    seen, ahead = set(), [(root, frozenset([""]))]
    while ahead:
        owner, extras = ahead.pop()
        if (owner, extras) in seen:
            continue
        seen.add((owner, extras))
        for line in metadata.requires(owner) or ():
            requirement = Requirement(line)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                continue
            version = _version(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                yield owner, f"{requirement.name}{requirement.specifier}", version
            else:
                ahead.append((requirement.name, frozenset(requirement.extras) | {""}))


def check_deepspeed_ops(device: torch.device) -> list[Finding]:
    """Which of DeepSpeed's compiled operators could be built here; megadsl needs none of them on a CPU."""
    prepare_deepspeed(device)
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    missing = [program for program in ("ninja", "c++") if not shutil.which(program)]
    if missing:
        return [Finding("DeepSpeed ops", f"none can be built: no {' and no '.join(missing)} on the PATH")]
    able = {name: bool(builder.is_compatible(verbose=False)) for name, builder in sorted(ALL_OPS.items()) if "not_implemented" not in name}
    words = {True: "can be built: ", False: "cannot: "}
    lists = (words[wanted] + ", ".join(name for name, can in able.items() if can == wanted) for wanted in words)
    return [Finding("DeepSpeed ops", "; ".join(text for text in lists if not text.endswith(": ")))]
