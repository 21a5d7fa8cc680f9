"""What a checkpoint holds, and in what two checkpoints differ; tensors are read one by one."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from megadsl.checkpoint.manifest import DamagedCheckpoint, damaged_files, read_manifest
from megadsl.checkpoint.store import SMALL_FILES, Checkpoint, CheckpointStore
from megadsl.checkpoint.weights import KINDS, TensorReader
from megadsl.errors import UserError


@dataclass(frozen=True)
class Difference:
    """a and b: values of a key; for a parameter, relative = |a - b| / |a| (Euclidean norms)."""

    key: str
    a: object
    b: object
    relative: float | None = None


def inspect(path: Path) -> dict:
    """Everything about the checkpoint in (or the newest folder below) `path`, damaged ones included; each file is read."""
    folder = _folder(path)
    report = {"path": str(folder), "complete": False, "problems": []}
    try:
        manifest = read_manifest(folder)
    except DamagedCheckpoint as error:
        return report | {"problems": [str(error)]}
    problems = damaged_files(folder, manifest)
    problems |= {name: f"{name} is missing" for name in SMALL_FILES if name not in manifest.files}
    info = asdict(manifest.info)
    del info["alarms"]  # the memory of the alarms: some hundred numbers that say nothing to a reader
    report |= info | {
        "complete": not problems, "problems": list(problems.values()), "files": len(manifest.files),
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "tensors": {kind: len(manifest.tensor_files(kind)) for kind in KINDS}, "format": "safetensors, fp32 by canonical name",
    }
    if not problems:
        checkpoint = Checkpoint(folder, manifest)
        plan, config = checkpoint.plan(), checkpoint.config()
        with TensorReader(folder, manifest) as reader:
            parameters = sum(math.prod(reader.shape("weights", name)) for name in reader.names("weights"))
        report |= {"scheme": plan.scheme, "family": plan.family, "layers": config.model.num_layers,
                   "hidden_size": config.model.hidden_size, "parameters": parameters}
    return report


def _folder(path: Path) -> Path:
    if path.name.startswith("iteration-") or (path / "manifest.json").exists():
        return path
    found = [*CheckpointStore(path / "checkpoints").candidates(), *CheckpointStore(path).candidates()]
    if not found:
        raise UserError(f"There is no checkpoint in {path}; give a run folder or one of its checkpoints/iteration-* folders.")
    return found[0]


def diff(a: Checkpoint, b: Checkpoint) -> dict[str, list[Difference]]:
    """Differences of config keys, of plan numbers and of weights (largest first)."""
    return {
        "config": _values(a.config().model_dump(mode="json"), b.config().model_dump(mode="json")),
        "plan": _values(json.loads(a.plan().to_json()), json.loads(b.plan().to_json())),
        "weights": _weights(a, b),
    }


def _values(a: dict, b: dict) -> list[Difference]:
    first, second = _flat(a), _flat(b)
    return [
        Difference(key, first.get(key), second.get(key)) for key in [*first, *(key for key in second if key not in first)]
        if first.get(key) != second.get(key)
    ]


def _flat(value, prefix: str = "") -> dict:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    return {key: leaf for name, inner in items for key, leaf in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()}


def _weights(a: Checkpoint, b: Checkpoint) -> list[Difference]:
    found = []
    with TensorReader(a.path, a.manifest) as first, TensorReader(b.path, b.manifest) as second:
        held = [set(first.names("weights")), set(second.names("weights"))]
        for name in sorted(held[0] | held[1]):
            shapes = [reader.shape("weights", name) if name in names else None
                      for reader, names in zip((first, second), held, strict=True)]
            if shapes[0] != shapes[1]:
                found.append(Difference(name, *shapes, math.inf))
                continue
            one, other = first.tensor("weights", name), second.tensor("weights", name)
            distance, size = float((one - other).norm()), float(one.norm())
            if distance:
                found.append(Difference(name, size, float(other.norm()), distance / size if size else math.inf))
    return sorted(found, key=lambda difference: -difference.relative)
