"""`causal_language_modeling`: a decoder predicts the next token, over packed documents if asked for, or after a prefix.

Evaluated by perplexity and bits per byte: documents are joined by end-of-document as in training and read in windows of seq_length
tokens that do not overlap, so a token sees at most seq_length - 1 tokens before it: an upper bound that is comparable between runs
of one seq_length. Shape letters: s sequence.
"""

import math
from typing import TYPE_CHECKING

from megadsl.data.dataset import Window
from megadsl.errors import UserError
from megadsl.tasks.language.options import CausalOptions
from megadsl.tasks.language.task import LanguageTask
from megadsl.tasks.task import EvaluationRequest

if TYPE_CHECKING:
    from megadsl.inference.load import TrainedModel
    from megadsl.inference.sampling import Sampling
    from megadsl.model.builder import ModelBuilder, TaskLayers
    from megadsl.tasks.language.causal_samples import Causal


class CausalLanguageModeling(LanguageTask):
    """Batch: tokens, labels, loss_mask [b, s]; segments [b, s] where documents are kept apart; prefix_length [b]."""

    name = "causal_language_modeling"
    Options = CausalOptions
    options: CausalOptions
    families = ("decoder",)

    @property
    def window(self) -> Window:
        s, shortest = self.model.seq_length, 2 if self.options.prefix_lm else 1
        if s < shortest:
            raise UserError(f"model.seq_length {s} is too short for this objective; set model.seq_length to at least {shortest}.")
        return Window(s, overlap=1)

    def objective(self) -> "Causal":
        from megadsl.tasks.language.causal_samples import Causal

        return Causal(self.options, self.tokenizer)

    def check_pieces(self) -> None:
        _ = self.window, self.tokenizer.eod

    def describe_objective(self) -> str:
        return "next token" + ", after a prefix" * self.options.prefix_lm

    @property
    def _context(self) -> tuple[str, ...]:
        given = {"segments": self.options.has_segments, "prefix_length": self.options.prefix_lm}
        return tuple(name for name, wanted in given.items() if wanted)

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("tokens", *self._context)

    def layers(self, builder: "ModelBuilder") -> "TaskLayers":
        from megadsl.model.builder import TaskLayers

        return TaskLayers(
            inputs=[
                builder.word_embedding(),
                builder.embedding_sum("embedding", self.model.seq_length, self.options.reset_position_ids),
            ],
            head=[builder.logits()], context=self._context, isolated=self.options.reset_attention_mask,
        )

    def evaluate(self, model: "TrainedModel", request: EvaluationRequest) -> dict[str, float | int | None]:
        from megadsl.tasks.evaluation import evaluation_sums
        from megadsl.tasks.language.causal_samples import TextWindows
        from megadsl.tasks.language.samples import Spread

        self.require_known(request)
        tokens, text_bytes = self.evaluation_text(request)
        if not tokens.size:
            raise UserError("There is no text to evaluate on.")
        length = self.model.seq_length
        windows = Spread(TextWindows(tokens, self.tokenizer.eod, length), -(-(request.max_tokens or tokens.size) // length))
        total, count = evaluation_sums(self, model, windows, request)["tokens"]
        size = max(1.0, count / tokens.size * text_bytes)
        return {
            "loss": total / count, "perplexity": math.exp(min(total / count, 700.0)), "bits_per_byte": total / math.log(2) / size,
            "tokens": int(count), "text_bytes": round(size),
        }

    def describe_results(self, results: dict[str, float | int | None]) -> str:
        return ("loss {loss:.4f} nats per token | perplexity {perplexity:.3f} | {bits_per_byte:.4f} bits per byte | {tokens:,} tokens, "
                "{text_bytes:,} bytes").format(**results)

    def generate(self, model: "TrainedModel", prompt: str, max_new_tokens: int, sampling: "Sampling", num_samples: int,
                 num_beams: int) -> list[str]:
        from megadsl.inference.generate import generate

        if num_beams > 1:
            raise UserError("--num-beams is for encoder-decoders; this checkpoint is a decoder.")
        return [prompt + text for text in generate(model, prompt, max_new_tokens, sampling, num_samples)]
