"""`denoising`: an encoder-decoder writes what was taken out of a text (T5's span corruption) or the whole text (BART's infilling).

Evaluated by the loss of target tokens and by exact spans: a span counts if each of its tokens is the likeliest one given the source
and the true target tokens before it, so that one wrong span does not spoil those behind it.
Shape letters: b batch, s source and t target length.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megadsl.data.dataset import Window
from megadsl.errors import UserError
from megadsl.tasks.language.lengths import Spans, spans_of
from megadsl.tasks.language.options import DenoisingOptions
from megadsl.tasks.language.task import LanguageTask
from megadsl.tasks.task import Batch, EvaluationRequest, Extent, LossPart, Sum

if TYPE_CHECKING:
    import torch

    from megadsl.inference.load import TrainedModel
    from megadsl.inference.sampling import Sampling
    from megadsl.model.activations import Activations
    from megadsl.model.builder import ModelBuilder, TaskLayers
    from megadsl.tasks.language.samples import Objective


class Denoising(LanguageTask):
    """Batch: source_tokens [b, s], target_tokens, labels, loss_mask [b, t]; source_segments [b, s] where sources are padded."""

    name = "denoising"
    Options = DenoisingOptions
    options: DenoisingOptions
    families = ("encoder_decoder",)
    loss_parts = (LossPart("target_tokens", "nats per token"),)
    metric_names = ("exact_span_accuracy",)

    @property
    def _infilling(self) -> bool:
        return self.options.corruption == "infilling"

    @property
    def _spans(self) -> Spans:
        return spans_of(self.model.seq_length, self.options.noise_density, self.options.mean_noise_span_length)

    @property
    def window(self) -> Window:
        s = self.model.seq_length
        if s < 3:
            raise UserError(f"model.seq_length {s} is too short for this objective; set model.seq_length to at least 3.")
        return Window(s - 1 if self._infilling else self._spans.length)

    @property
    def filled_target(self) -> int:
        """Target tokens that every sample fills; the rest of model.decoder_seq_length is padding."""
        return self.model.seq_length if self._infilling else self._spans.target

    def objective(self) -> "Objective":
        from megadsl.tasks.language.denoising_samples import Infilling, SpanCorruption

        return (Infilling if self._infilling else SpanCorruption)(self.options, self.model, self.tokenizer)

    def check_pieces(self) -> None:
        tokenizer, length = self.tokenizer, self.model.seq_length
        _ = self.window, tokenizer.bos, tokenizer.eos
        if self._infilling:
            _ = tokenizer.mask
        elif (sentinels := len(tokenizer.additional_special_tokens_ids)) < (count := self._spans.count):
            raise UserError(
                f"Span corruption at model.seq_length {length} needs {count} sentinels, but the tokenizer {tokenizer.name} has "
                f"{sentinels}; make one with megadsl tokenizer train --num-sentinels {count}, or set a longer "
                "task.mean_noise_span_length."
            )
        if self.model.target_length < self.filled_target:
            raise UserError(
                f"model.decoder_seq_length {self.model.target_length} is too short for task.corruption {self.options.corruption} at "
                f"model.seq_length {length}; set model.decoder_seq_length={self.filled_target}."
            )

    def describe_objective(self) -> str:
        name = self.options.corruption.replace("_", " ")
        return f"{name}, {self.options.noise_density:.0%} in spans of {self.options.mean_noise_span_length:g} on average"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("source_tokens", "target_tokens", *self._context)

    @property
    def _context(self) -> tuple[str, ...]:
        return ("source_segments",) if self._infilling else ()

    def layers(self, builder: "ModelBuilder") -> "TaskLayers":
        from megadsl.model.builder import TaskLayers

        return TaskLayers(
            inputs=[builder.word_embedding("source_tokens", shared=True), builder.embedding_sum("encoder.embedding", self.model.seq_length)],
            target_inputs=[builder.target_words(), builder.embedding_sum("decoder.embedding", self.model.target_length)],
            head=[builder.logits()], context=self._context, target_context=("target_tokens",),
        )

    def extent(self, batch: Batch) -> Extent:
        segments = batch.get("source_segments")
        source = batch["source_tokens"].numel() if segments is None else int((segments > 0).sum())
        positions = batch["source_tokens"].numel() + batch["target_tokens"].numel()
        return Extent(source + int(batch["loss_mask"].sum()), positions)

    def real_positions(self, batch: Batch) -> Batch:
        source = {"encoder": batch["source_segments"] > 0} if "source_segments" in batch else {}
        return {**source, "decoder": batch["loss_mask"] > 0}

    def metrics(self, output: "Activations", targets: Batch) -> Sequence[Sum]:
        from megadsl.model.loss import likeliest_tokens

        right = likeliest_tokens(output["logits"], self.tokenizer.vocab_size) == targets["labels"]
        return (exact_spans(right, targets["target_spans"]),)

    @property
    def targets(self) -> tuple[str, ...]:
        return ("labels", "loss_mask", "target_spans")

    def evaluate(self, model: "TrainedModel", request: EvaluationRequest) -> dict[str, float | int | None]:
        self.require_known(request)
        sums = self.evaluation_sums(model, self.evaluation_text(request)[0], request)
        (total, count), (exact, spans) = sums["target_tokens"], sums["exact_span_accuracy"]
        return {
            "loss": total / count, "perplexity": math.exp(min(total / count, 700.0)), "tokens": int(count),
            "exact_span_accuracy": exact / spans if spans else 0.0, "spans": int(spans),
        }

    def describe_results(self, results: dict[str, float | int | None]) -> str:
        return ("denoising loss {loss:.4f} nats per target token | perplexity {perplexity:.3f} ({tokens:,} tokens) | "
                "exact-span accuracy {exact_span_accuracy:.4f} ({spans:,} spans)").format(**results)

    def generate(self, model: "TrainedModel", prompt: str, max_new_tokens: int, sampling: "Sampling", num_samples: int,
                 num_beams: int) -> list[str]:
        from megadsl.inference.seq2seq import generate_target

        return generate_target(model, prompt, max_new_tokens, sampling, num_samples, num_beams)

    def export_sample(self) -> Batch:
        import torch

        from megadsl.tasks.language.texts import export_rows

        source = export_rows(self.tokenizer, self.model.seq_length)
        segments = torch.ones_like(source)
        if self._infilling:  # the second row is padded
            segments[1, source.size(1) // 2:] = 0
        return {"source_tokens": source, "source_segments": segments,
                "target_tokens": export_rows(self.tokenizer, self.model.target_length, start=7)}


def exact_spans(right: "torch.Tensor", span: "torch.Tensor") -> Sum:
    """(spans without a wrong token, spans): `right` [b, t] bool, `span` [b, t] the number of the span from 1, 0 elsewhere."""
    import torch

    most = span.size(1) + 1
    wrong = torch.zeros(len(span), most, device=span.device).scatter_add_(1, span, (~right).float())
    present = torch.zeros_like(wrong).scatter_(1, span, 1.0)[:, 1:] > 0
    return Sum((present & (wrong[:, 1:] == 0)).sum(), present.sum())
