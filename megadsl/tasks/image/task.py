"""`image_classification`: a Vision Transformer (arXiv 2010.11929) over patches of an image, one label an image.

The encoder is the trunk; in front of it every patch goes through one linear map, behind it a classifier reads the class token or the
mean of all patches. The loss is the cross-entropy with the sample's target (a label, smoothed or blended of two).
Shape letters: b micro-batch, c channels, H height, W width, k classes, h hidden.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megadsl.config.model import ModelConfig
from megadsl.data.epoch_order import evenly_spread
from megadsl.errors import UserError
from megadsl.tasks.image.options import ImageOptions
from megadsl.tasks.image.positions import plane_waves
from megadsl.tasks.image.prepared import MANIFEST, ImageSet, Prepared
from megadsl.tasks.task import Batch, EvaluationRequest, LossPart, Sum, Task
from megadsl.theory.inputs import TokenStatistics

if TYPE_CHECKING:
    import torch

    from megadsl.inference.load import TrainedModel
    from megadsl.model.activations import Activations
    from megadsl.model.builder import ModelBuilder, TaskLayers
    from megadsl.schemes.plan import SignalPlan
    from megadsl.tasks.image.samples import ImageSplits

MEASURED_IMAGES = 512  # of the training split, for the statistics of the input
_POSITIONS = ("learned_absolute", "sinusoidal", "none")


class ImageClassification(Task):
    """Batch: pixel_values [b, c, H, W] fp32, target [b, k] fp32, label [b]."""

    name = "image_classification"
    Options = ImageOptions
    options: ImageOptions
    families = ("encoder",)
    exports_itself = True
    loss_parts = (LossPart("classes", "nats per image"),)
    metric_names = ("top1_accuracy", "top5_accuracy")
    evaluation_options = ("max_samples", "corruptions", "corrupted", "figures")
    inputs = ("pixel_values",)
    targets = ("target", "label")

    @property
    def model(self) -> ModelConfig:
        return self.config.model.model_copy(update={"untie_embeddings_and_output_weights": True})

    # The data.

    @property
    def folder(self) -> Path:
        """The prepared images of the run."""
        datasets = self.config.data.datasets
        if len(datasets) != 1:
            raise UserError(f"data.datasets names {len(datasets)} folders; image_classification reads one, made by megadsl data images.")
        return Path(datasets[0].path)

    @cached_property
    def prepared(self) -> Prepared:
        return Prepared(self.folder)

    @cached_property
    def described(self) -> ImageSet:
        """Sizes, classes and normalisation: those that a loaded checkpoint was trained with, else those of the data."""
        if self.saved is not None and (self.saved / MANIFEST).is_file():
            return ImageSet.load(self.saved / MANIFEST)
        return self.prepared.described

    def check(self) -> None:
        one, patch, model = self.described, self.options.patch_size, self.config.model
        if one.height % patch or one.width % patch:
            raise UserError(f"task.patch_size {patch} does not divide the images of {self.folder}, which are {one.height} x {one.width}; choose "
                            "a divisor, or prepare them with another --size.")
        if model.position_embedding_type not in _POSITIONS:
            raise UserError(f"model.position_embedding_type {model.position_embedding_type} knows one direction, patches have two; take one of "
                            f"{', '.join(_POSITIONS)}.")
        rows, columns = self.grid
        tokens = rows * columns + self.has_class_token
        if model.seq_length != tokens:
            behind = " behind a class token" * self.has_class_token
            raise UserError(f"model.seq_length is {model.seq_length}, but images of {one.height} x {one.width} in patches of {patch} x {patch} are "
                            f"{rows} x {columns} patches{behind}; set model.seq_length={tokens}.")
        for split in ("train", "validation") if self.config.training.eval_iters else ("train",):
            if not one.counts[split]:
                raise UserError(f"The {split} split of {self.folder} is empty; prepare more images, or with another --validation-fraction.")
        if self.config.training.eval_iters * self.config.training.global_batch_size > one.counts["validation"]:
            raise UserError(
                f"training.eval_iters {self.config.training.eval_iters} x training.global_batch_size {self.config.training.global_batch_size} are "
                f"more than the {one.counts['validation']} images of the validation split of {self.folder}; lower training.eval_iters.")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row."""
        return self.described.height // self.options.patch_size, self.described.width // self.options.patch_size

    @property
    def has_class_token(self) -> bool:
        return self.options.pooling == "class_token"

    @property
    def padded_output_size(self) -> int:
        return len(self.described.classes)

    def files(self) -> dict[str, bytes]:
        return {MANIFEST: (self.folder / MANIFEST).read_bytes()}

    def data_fingerprints(self) -> dict[str, str]:
        return {f"data.datasets.0.{name}": value for name, value in self.prepared.described.sha256.items() if name.startswith("train")}

    def splits(self, train_samples: int) -> "ImageSplits":
        from megadsl.tasks.image.samples import ImageSplits

        return ImageSplits(self.prepared, self.described, self.options, self.config.training.seed)

    # The theory's input.

    def input_statistics(self) -> TokenStatistics:
        return self._statistics

    @cached_property
    def _statistics(self) -> TokenStatistics:
        from megadsl.tasks.image.statistics import patch_statistics, patches_of
        from megadsl.tasks.image.transforms import Augmentation

        augmentation, count = Augmentation(self.options, self.described, self.prepared.train), len(self.prepared.train)
        pixels = np.stack([augmentation.sample(place, np.random.RandomState(index))[0]
                           for index, place in enumerate(evenly_spread(count, MEASURED_IMAGES))])
        patches = patches_of(pixels, self.options.patch_size)
        return patch_statistics(patches, self.padded_output_size, self.has_class_token, self._waves)

    @property
    def _waves(self) -> np.ndarray | None:
        if self.config.model.position_embedding_type != "sinusoidal":
            return None
        return plane_waves(*self.grid, self.config.model.hidden_size, self.has_class_token)

    def describe_inputs(self) -> str:
        statistics, (rows, columns) = self.input_statistics(), self.grid
        return (f"{statistics.vocab_size} classes, {rows} x {columns} patches{' and a class token' * self.has_class_token}, second moment "
                f"{statistics.projected_second_moment:.4f}, overlap {statistics.repeats:.4f}")

    # The model.

    def layers(self, builder: "ModelBuilder") -> "TaskLayers":
        from functools import partial

        from megadsl.model.builder import TaskLayers
        from megadsl.model.stack import LayerEntry
        from megadsl.tasks.image.layers import ImageClassifier, PatchEmbedding

        std, head, one = builder.plan.embedding.weight_std["input_projection"], builder.plan.head, self.described
        token_std = builder.plan.embedding.weight_std.get("class_token")
        sizes = builder.core.hidden_size, builder.core.params_dtype
        return TaskLayers(
            inputs=[
                LayerEntry("embedding.patches", partial(PatchEmbedding, *sizes, one.channels, self.options.patch_size, std, token_std)),
                builder.embedding_sum("embedding", self.model.seq_length, waves=self._waves),
            ],
            head=[LayerEntry("classifier", partial(ImageClassifier, *sizes, builder.padded_vocab_size, head.weight_std["output_head"],
                                                   not self.has_class_token, head.hidden_scale))],
        )

    def loss(self, output: "Activations", targets: Batch) -> "Sequence[torch.Tensor]":
        # Added in fp64: what is evaluated does not depend on how many images a forward pass takes.
        return (-(output["logits"].float().log_softmax(dim=-1) * targets["target"]).double().sum(),)

    def counts(self, batch: Batch) -> Sequence[float]:
        return (float(len(batch["label"])),)

    def metrics(self, output: "Activations", targets: Batch) -> Sequence[Sum]:
        import torch

        logits, label = output["logits"].float(), targets["label"].unsqueeze(1)
        best = logits.topk(min(5, logits.size(1)), dim=1).indices == label
        count = best.new_full((), len(label), dtype=torch.long)
        return Sum(best[:, 0].sum(), count), Sum(best.any(dim=1).sum(), count)

    def head_multiplications(self) -> float:
        one = self.described
        return float(self.model.hidden_size * (self.padded_output_size + one.channels * one.height * one.width))

    # A trained model.

    def evaluate(self, model: "TrainedModel", request: EvaluationRequest) -> dict:
        from megadsl.tasks.image.evaluation import evaluate

        self.require_known(request)
        return evaluate(self, model, request)

    def describe_results(self, results: dict) -> str:
        from megadsl.tasks.image.report import describe

        return describe(results)

    def export_sample(self) -> Batch:
        import torch

        samples = self.evaluation_samples(EvaluationRequest(None, "test" if self.described.counts["test"] else "validation"), 4)
        return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}

    def export_huggingface(self, model: "TrainedModel", plan: "SignalPlan", folder: Path) -> tuple[str, float]:
        import torch

        from megadsl.checkpoint.huggingface.vit import NAME, Pictures, export_vit

        if not self.has_class_token:
            raise UserError(f"task.pooling=mean has no place in {NAME}, which reads the class token; train with task.pooling=class_token.")
        one, sample = self.described, self.export_sample()
        weights = {name: parameter.detach() for name, parameter in model.network.canonical_parameters()}
        if self._waves is not None:
            weights["embedding.position"] = torch.from_numpy(self._waves).float() * plan.embedding.weight_std["position_embedding"]
        with torch.inference_mode():
            logits = model(sample)["logits"]
        pictures = Pictures((one.height, one.width), self.options.patch_size, one.channels, one.classes, one.mean, one.deviation)
        return NAME, export_vit(weights, plan, self.config.model, pictures, sample["pixel_values"], logits, folder)
