"""`masked_language_modeling`: an encoder predicts masked tokens (arXiv 1810.04805), and the order of two halves (arXiv 1909.11942).

Evaluated by accuracy and loss of masked tokens, and pseudo-perplexity (Salazar et al., arXiv 1910.14659, section 2.3): every token
in turn is masked alone and predicted from all others, exp of the mean negative log-probability. It costs one forward pass per
token, so it is taken over fewer tokens. Shape letters: b batch, s sequence, v vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megadsl.config import Config
from megadsl.data.dataset import Window
from megadsl.errors import UserError
from megadsl.tasks.language.options import MaskedOptions
from megadsl.tasks.language.task import LanguageTask
from megadsl.tasks.task import Batch, EvaluationRequest, LossPart, Sum
from megadsl.theory.inputs import TokenStatistics

if TYPE_CHECKING:
    import torch

    from megadsl.inference.load import TrainedModel
    from megadsl.model.activations import Activations
    from megadsl.model.builder import ModelBuilder, TaskLayers
    from megadsl.tasks.language.masked_samples import Masked

PSEUDO_TOKENS = 512
# Two parts have the two token types, cut anywhere in the middle half of the text; E[c^2 + (1 - c)^2] for c uniform in [1/4, 3/4].
_SAME_TYPE_OF_TWO_PARTS = 13.0 / 24.0


class MaskedLanguageModeling(LanguageTask):
    """Batch: tokens, labels, loss_mask [b, s]; segments [b, s] where documents are kept apart; tokentypes [b, s] where the model
    has a table of them; sentence_order [b] (1: swapped)."""

    name = "masked_language_modeling"
    Options = MaskedOptions
    options: MaskedOptions
    families = ("encoder",)
    loss_parts = (LossPart("masked_tokens", "nats per token"),)
    predicts_in_place = True
    evaluation_options = ("max_tokens", "pseudo_tokens")

    def __init__(self, config: Config):
        super().__init__(config)
        options, types = self.options, config.model.num_tokentypes
        if options.sentence_order and options.has_segments:
            raise UserError(
                "task.sentence_order compares two halves of a sequence, which task.reset_position_ids and task.reset_attention_mask "
                "cut into documents; switch one of them off."
            )
        if options.sentence_order and types < 2:
            raise UserError(
                f"task.sentence_order tells two halves apart by token types, but model.num_tokentypes is {types}; set "
                "model.num_tokentypes=2."
            )
        self.metric_names = ("masked_token_accuracy",)
        if options.sentence_order:
            self.loss_parts += (LossPart("sentence_order", "nats per sequence"),)
            self.metric_names += ("sentence_order_accuracy",)

    @property
    def window(self) -> Window:
        # [CLS] text [SEP], or [CLS] A [SEP] B [SEP]; two tokens of text, so that one of them is not an end of document.
        s, special = self.model.seq_length, 3 if self.options.sentence_order else 2
        if s < special + 2:
            raise UserError(f"model.seq_length {s} is too short for this objective; set model.seq_length to at least {special + 2}.")
        return Window(s - special)

    def objective(self) -> "Masked":
        from megadsl.tasks.language.masked_samples import Masked

        return Masked(self.options, self.tokenizer)

    def check_pieces(self) -> None:
        _ = self.window, self.tokenizer.mask, self.tokenizer.cls, self.tokenizer.sep

    def describe_objective(self) -> str:
        words = "whole words" if self.options.masking_do_full_word else "pieces"
        order = ", and the order of two halves" * self.options.sentence_order
        return f"masked tokens, {self.options.masking_probability:.0%} as {words}{order}"

    def statistics_of_objective(self, statistics: TokenStatistics) -> TokenStatistics:
        return replace(
            statistics, masking_probability=self.options.masking_probability,
            same_type_probability=_SAME_TYPE_OF_TWO_PARTS if self.options.sentence_order else 1.0,
        )

    @property
    def _context(self) -> tuple[str, ...]:
        return ("segments",) if self.options.has_segments else ()

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("tokens", *self._context, *(("tokentypes",) if self.model.num_tokentypes else ()))

    @property
    def targets(self) -> tuple[str, ...]:
        return ("labels", "loss_mask", *(("sentence_order",) if self.options.sentence_order else ()))

    def layers(self, builder: "ModelBuilder") -> "TaskLayers":
        from megadsl.model.builder import TaskLayers

        return TaskLayers(
            inputs=[
                builder.word_embedding(),
                builder.embedding_sum("embedding", self.model.seq_length, self.options.reset_position_ids),
            ],
            head=[builder.masked_head(self.options.sentence_order), builder.logits(), builder.output_bias()],
            context=self._context, isolated=self.options.reset_attention_mask,
        )

    def counts(self, batch: Batch) -> Sequence[float]:
        return (*super().counts(batch), *((float(len(batch["sentence_order"])),) if self.options.sentence_order else ()))

    def loss(self, output: "Activations", targets: Batch) -> "Sequence[torch.Tensor]":
        parts = super().loss(output, targets)
        if not self.options.sentence_order:
            return parts
        import torch.nn.functional as F

        return (*parts, F.cross_entropy(output["order_logits"].float(), targets["sentence_order"], reduction="none").double().sum())

    def metrics(self, output: "Activations", targets: Batch) -> Sequence[Sum]:
        from megadsl.model.loss import likeliest_tokens

        right = likeliest_tokens(output["logits"], self.tokenizer.vocab_size) == targets["labels"]
        found = (Sum((right * targets["loss_mask"]).sum(), targets["loss_mask"].sum()),)
        if not self.options.sentence_order:
            return found
        order = output["order_logits"].argmax(dim=-1) == targets["sentence_order"]
        return (*found, Sum(order.sum(), order.new_tensor(order.numel(), dtype=targets["loss_mask"].dtype)))

    def head_multiplications(self) -> float:
        # The transform in front of the logits.
        return super().head_multiplications() + self._predicted_positions * self.model.hidden_size ** 2

    def evaluate(self, model: "TrainedModel", request: EvaluationRequest) -> dict[str, float | int | None]:
        from megadsl.tasks.evaluation import evaluation_sums
        from megadsl.tasks.language.masked_samples import OneMasked

        self.require_known(request)
        tokens, _ = self.evaluation_text(request)
        sums = self.evaluation_sums(model, tokens, request)
        mean = {name: total / count for name, (total, count) in sums.items() if count}
        results = {
            "masked_accuracy": mean.get("masked_token_accuracy"), "masked_loss": mean.get("masked_tokens"),
            "masked_tokens": int(sums["masked_tokens"].count), "pseudo_perplexity": None, "pseudo_perplexity_tokens": 0,
            "sentence_order_loss": mean.get("sentence_order"), "sentence_order_accuracy": mean.get("sentence_order_accuracy"),
        }
        wanted = PSEUDO_TOKENS if request.pseudo_tokens is None else request.pseudo_tokens
        if wanted:
            alone = OneMasked(tokens, self.objective(), self.window.length, self.tokenizer, wanted)
            total, count = evaluation_sums(self, model, alone, request)["masked_tokens"]
            results |= {"pseudo_perplexity": math.exp(min(total / count, 700.0)), "pseudo_perplexity_tokens": int(count)}
        return results

    def describe_results(self, results: dict[str, float | int | None]) -> str:
        pseudo = "" if results["pseudo_perplexity"] is None else (
            f" | pseudo-perplexity {results['pseudo_perplexity']:.3f} ({results['pseudo_perplexity_tokens']:,} tokens)"
        )
        order = "" if results["sentence_order_accuracy"] is None else (
            f" | sentence-order accuracy {results['sentence_order_accuracy']:.4f}, loss {results['sentence_order_loss']:.4f} nats"
        )
        return (
            f"masked-token accuracy {results['masked_accuracy']:.4f} | masked loss {results['masked_loss']:.4f} nats per token "
            f"({results['masked_tokens']:,} tokens){pseudo}{order}"
        )

    def export_sample(self) -> Batch:
        sample = super().export_sample()
        sample["tokens"][:, 3::7] = self.tokenizer.special_ids.get("mask", 0)
        return sample
