"""`megadsl diagnose`: a model of ours or of Hugging Face, opened and measured on one process."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megadsl.checkpoint.store import Checkpoint, open_checkpoint
from megadsl.config import Config
from megadsl.data.dataset import MANIFEST
from megadsl.errors import UserError
from megadsl.inference.load import TrainedModel
from megadsl.monitor.diagnosis.fitting import candidates, fit_plans, profile
from megadsl.monitor.diagnosis.observe import Observation
from megadsl.monitor.diagnosis.result import Diagnosis, Outlier
from megadsl.monitor.diagnosis.skipping import choose_skips, skip_losses
from megadsl.monitor.signal import Point, SignalRecord, points_of
from megadsl.parallel.groups import destroy_groups
from megadsl.schemes.plan import SignalPlan
from megadsl.tasks.export import import_from_huggingface
from megadsl.tasks.task import Batch, EvaluationRequest, Task
from megadsl.tasks.trained import load_trained

_LISTED_OUTLIERS = 12


@dataclass(frozen=True)
class Subject:
    """A model to diagnose. `imported`: from Hugging Face, plain: its plan says nothing of how it was trained."""

    task: Task
    model: TrainedModel
    checkpoint: Checkpoint
    plan: SignalPlan
    imported: bool


@contextmanager
def opened_model(path: Path, device: str, tokenizer: Path | None) -> Iterator[Subject]:
    """A run folder, a checkpoint, or a folder of Hugging Face, which is imported beside and removed again.

    Raises:
        UserError: it is none of these, or an architecture that cannot be imported.
    """
    theirs = (path / "config.json").is_file() and not (path / "manifest.json").is_file()
    if not path.is_dir():
        raise UserError(f"{path} is no folder; give a run folder, a checkpoint or the folder of a Hugging Face model.")
    if tokenizer is not None and not theirs:
        raise UserError(f"--tokenizer goes with a Hugging Face model; {path} has its own.")
    folder = Path(tempfile.mkdtemp(prefix="megadsl-diagnose-")) if theirs else None
    try:
        if theirs:
            import_from_huggingface(path, folder / "checkpoint", "vanilla", tokenizer)
            destroy_groups()  # of the import, which compared logits on a CPU
        checkpoint = open_checkpoint(folder / "checkpoint" if theirs else path)
        task, model = load_trained(checkpoint, device)
        yield Subject(task, model, checkpoint, checkpoint.plan(), theirs)
    finally:
        destroy_groups()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def diagnose(subject: Subject, request: EvaluationRequest, num_samples: int, num_skips: int) -> Diagnosis:
    """Measure a model on `num_samples` samples: forward, backward, and about `num_skips` times with layers left out.

    Raises:
        UserError: there is no data, or it does not fit the model.
    """
    task, model = subject.task, subject.model
    batches, counts = _batches(task, model, request, num_samples)

    def loss_of(output, batch) -> torch.Tensor:
        """A batch's share of the mean loss over all batches."""
        return sum(total / max(1.0, count) for total, count in zip(task.loss(output, batch), counts, strict=True))

    model.network.requires_grad_(False)  # the activations' gradients alone are asked for
    points, loss = points_of(subject.plan), 0.0
    with Observation(model.network, points, model.definition.embedding) as seen, torch.enable_grad():
        for batch in batches:
            share = loss_of(seen.run(model.definition.inputs_of(batch)), batch)
            share.backward()
            loss += float(share.detach())
    record = SignalRecord(subject.checkpoint.info.iteration, seen.values())
    ratio, outliers = _outliers(points, *seen.coordinates(), record.values["forward_second_moment"])
    skips = choose_skips(subject.plan, num_skips) if num_skips else []
    skips = skip_losses(model.network, subject.plan, skips, batches, model.definition.inputs_of, loss_of)
    plans = candidates(_described_by(model.config, request))
    fits = fit_plans(plans, record.values["forward_second_moment"], record.values["gradient_variance"])
    nearest = profile(plans[fits[0].scheme], fits[0].folded) if fits else ()
    facts = _facts(subject) | {"samples": sum(len(next(iter(batch.values()))) for batch in batches)}
    return Diagnosis(facts, points, record, loss, seen.heads(), ratio, outliers, skips, fits,
                     dict(zip(("forward_second_moment", "gradient_variance"), (row.tolist() for row in nearest), strict=False)))


def _batches(task: Task, model: TrainedModel, request: EvaluationRequest, num_samples: int) -> tuple[list[Batch], Sequence[float]]:
    """(batches on the model's device, how many items each part of the loss counts over all of them)."""
    samples = task.evaluation_samples(request, num_samples)
    if not len(samples):
        raise UserError("There is no sample to diagnose the model on; give more data.")
    size = max(1, request.batch_tokens // task.positions_per_sample)
    batches = [task.collate(samples[start:start + size]) for start in range(0, len(samples), size)]
    counts = [sum(parts) for parts in zip(*map(task.counts, batches), strict=True)]
    return [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches], counts


def _described_by(config: Config, request: EvaluationRequest) -> Config:
    """The configuration with the data's own token statistics, where it is a dataset folder."""
    if request.data is None or not (Path(request.data) / MANIFEST).is_file():
        return config
    data = config.data.model_validate({"datasets": [request.data]})
    return config.model_copy(update={"data": data})


def _outliers(points: list[Point], largest: np.ndarray, mean: np.ndarray, second: np.ndarray) -> tuple[list[float], list[Outlier]]:
    """(largest |activation| over the stream's root mean square at every point, the coordinates where that is largest)."""
    ratio = largest / np.sqrt(second)[:, None]
    highest = np.nanargmax(np.where(np.isnan(ratio), -1.0, ratio), axis=0)  # the point where a coordinate stands out most
    found = sorted((Outlier(points[point].name, coordinate, float(ratio[point, coordinate])) for coordinate, point in enumerate(highest)),
                   key=lambda one: -one.ratio)
    return np.max(ratio, axis=1).tolist(), found[:_LISTED_OUTLIERS]


def _facts(subject: Subject) -> dict[str, object]:
    model, info = subject.model.config.model, subject.checkpoint.info
    layers = " + ".join(f"{count} {stack}" for stack, count in model.stack_layers.items())
    scalars = any(s.residual_scale != 1.0 or s.branch_scale != 1.0 or s.gate != "fixed" for s in subject.plan.sublayers)
    return {
        "source": "Hugging Face" if subject.imported else "megadsl", "task": subject.task.name,
        "scheme": None if subject.imported else subject.plan.scheme, "iteration": None if subject.imported else info.iteration,
        "layers": layers, "width": model.hidden_size, "heads": model.num_attention_heads, "norms": subject.plan.norm_position,
        "positions": " + ".join(map(str, model.stack_lengths.values())),
        "parameters": sum(parameter.numel() for parameter in subject.model.network.parameters()),
        "scalars": "in the layers (unfolded)" if scalars else "none (plain or folded)",
    }
