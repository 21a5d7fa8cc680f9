"""`question_answering`: the span of a context that answers a question, or that there is none (SQuAD, arXiv 1606.05250 and 1806.03822).

The head gives every token a score as start and one as end; a context that is longer than a sequence is read in sliding windows
(windows.py). Evaluated by exact match and F1 after SQuAD's normalisation. Shape letters: b micro-batch, s sequence, n windows.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from megadsl.config import Config
from megadsl.errors import UserError
from megadsl.tasks.task import Batch, EvaluationRequest, LossPart, Sum
from megadsl.tasks.text.options import QuestionOptions
from megadsl.tasks.text.prepared import PreparedText, SplitArrays
from megadsl.tasks.text.sequences import SHORTEST
from megadsl.tasks.text.sequences import Sequence as TextSequence
from megadsl.tasks.text.sequences import sequence_of
from megadsl.tasks.text.task import TextTask
from megadsl.tasks.text.windows import Span, WindowIndex, best_spans

if TYPE_CHECKING:
    import torch

    from megadsl.inference.load import TrainedModel
    from megadsl.model.activations import Activations
    from megadsl.model.builder import ModelBuilder
    from megadsl.model.stack import LayerEntry

QUESTION, CONTEXT = 0, 1


class QuestionAnswering(TextTask):
    """Batch: tokens, segments (and token types) [b, s], spans [b, 2]: start and end (-1: has none, and does not count)."""

    name = "question_answering"
    kind = "questions"
    exported_as = "QuestionAnswering"
    Options = QuestionOptions
    options: QuestionOptions
    targets = ("spans",)
    loss_parts = (LossPart("span", "nats per end"),)
    metric_names = ("window_exact_match",)
    # Only start and end carry much of the gradient; over all tokens it adds up to 0.
    pooled = "all"

    def __init__(self, config: Config):
        super().__init__(config)
        self._index = cache(self._make_index)

    def check(self) -> None:
        super().check()
        options, length = self.options, self.model.seq_length
        needed = options.max_query_length + self.markers.count(2) + SHORTEST
        if length < needed:
            raise UserError(f"model.seq_length {length} leaves no room for a context behind questions of up to task.max_query_length "
                            f"{options.max_query_length} tokens; set model.seq_length to at least {needed}, or task.max_query_length lower.")

    def _make_index(self, arrays: SplitArrays) -> WindowIndex:
        lengths = np.diff(arrays.starts).reshape(-1, arrays.parts)
        options = self.options
        return WindowIndex.of(lengths[:, QUESTION], lengths[:, CONTEXT], self.model.seq_length, self.markers.count(2),
                              options.max_query_length, options.doc_stride)

    def count_samples(self, arrays: SplitArrays) -> int:
        return len(self._index(arrays))

    def sequences(self, arrays: SplitArrays, row: int) -> tuple[list[TextSequence], dict[str, np.ndarray]]:
        sequence, begin, tokens = self._window(arrays, row)
        offset, marker = sequence.offsets[CONTEXT], self._marker(sequence)
        first, last = arrays.labels[self._index(arrays).rows[row]]
        inside = 0 <= first and begin <= first and last < begin + tokens
        span = (offset + first - begin, offset + last - begin) if inside else (marker, marker)
        return [sequence], {"spans": np.array(span, dtype=np.int64)}

    def _window(self, arrays: SplitArrays, number: int) -> tuple[TextSequence, int, int]:
        """(what the model reads, first token of the context in it, tokens of the context in it)."""
        index = self._index(arrays)
        row, begin = int(index.rows[number]), int(index.begins[number])
        question = arrays.part(row, QUESTION)[:self.options.max_query_length]
        room = self.model.seq_length - self.markers.count(2) - len(question)
        context = arrays.part(row, CONTEXT)[begin:begin + room]
        return sequence_of([question, context], self.markers, self.model.seq_length), begin, len(context)

    def _marker(self, sequence: TextSequence) -> int:
        """The position that stands for "no answer here": <cls>, or a decoder's last token."""
        return 0 if self.markers.first is not None else len(sequence.tokens) - 1

    @property
    def unlabelled(self) -> dict[str, np.ndarray]:
        return {"spans": np.array((-1, -1))}

    def head(self, builder: "ModelBuilder") -> "LayerEntry":
        from megadsl.model.stack import LayerEntry
        from megadsl.tasks.text.heads import SpanHead

        return LayerEntry("classifier", partial(SpanHead, builder))

    def loss(self, output: "Activations", targets: Batch) -> "Sequence[torch.Tensor]":
        import torch.nn.functional as F

        # [b, s, 2] as classes behind samples: start and end are two predictions.
        losses = F.cross_entropy(output["logits"].float(), targets["spans"], ignore_index=-1, reduction="none")
        return (losses.double().sum(),)

    def counts(self, batch: Batch) -> Sequence[float]:
        return (float((batch["spans"] >= 0).sum()),)

    def metrics(self, output: "Activations", targets: Batch) -> Sequence[Sum]:
        spans = targets["spans"]
        counted = spans[:, 0] >= 0
        right = (output["logits"].argmax(dim=1) == spans).all(dim=1)
        return (Sum(right[counted].sum(), counted.sum()),)

    def evaluate(self, model: "TrainedModel", request: EvaluationRequest) -> dict[str, float | int | None]:
        from megadsl.tasks.text.metrics import answer_metrics, torchmetrics

        self.require_known(request)
        torchmetrics(self.name)
        prepared = self.prepared_at(request.data)
        texts, nulls = self.predictions(model, prepared, request)
        rows = prepared.split(request.split).texts
        threshold, has_nulls = self.options.null_score_threshold, bool(prepared.manifest["unanswerable"])
        if has_nulls:
            texts = ["" if null > threshold else text for text, null in zip(texts, nulls, strict=True)]
        answers = [row["answers"] for row in rows]
        found = answer_metrics(self.name, texts, answers)
        if has_nulls:
            for name, wanted in (("answerable", True), ("unanswerable", False)):
                chosen = [index for index, right in enumerate(answers) if bool(right) == wanted]
                if chosen:
                    part = answer_metrics(self.name, [texts[i] for i in chosen], [answers[i] for i in chosen])
                    found |= {f"{name}_{key}": value for key, value in part.items()}
        return {**found, "questions": len(rows), "windows": len(self._index(prepared.split(request.split)))}

    def predictions(self, model: "TrainedModel", prepared: PreparedText, request: EvaluationRequest) -> tuple[list[str], list[float]]:
        """(the best span's text of every question, by how much the score of none exceeds its score)."""
        import torch

        from megadsl.tasks.text.predictions import outputs_of

        arrays, length = prepared.split(request.split), self.model.seq_length

        def read(output: "Activations", batch: Batch) -> torch.Tensor:
            scores = output["logits"].float().nan_to_num(neginf=-1e9)
            missing = length - scores.size(1)
            return torch.nn.functional.pad(scores, (0, 0, 0, missing), value=-1e9).flatten(1)

        scores = outputs_of(self, model, self.samples_of(prepared, request.split), request.batch_tokens, 2 * length, read)
        best: list[Span | None] = [None] * len(arrays)
        null = np.full(len(arrays), np.inf)
        index = self._index(arrays)
        for number, (start, end) in enumerate(scores.view(-1, length, 2).transpose(1, 2).numpy()):
            sequence, begin, tokens = self._window(arrays, number)
            row, marker = index.rows[number], self._marker(sequence)
            null[row] = min(null[row], start[marker] + end[marker])
            spans = best_spans(start, end, sequence.offsets[CONTEXT], begin, tokens, self.options.n_best, self.options.max_answer_length)
            if spans and (best[row] is None or spans[0].score > best[row].score):
                best[row] = spans[0]
        texts = [self._text(arrays, row, span) for row, span in enumerate(best)]
        return texts, [float(none) - (span.score if span else -np.inf) for none, span in zip(null, best, strict=True)]

    def _text(self, arrays: SplitArrays, row: int, span: Span | None) -> str:
        if span is None:
            return ""
        covered = arrays.characters_of(row, CONTEXT)
        return arrays.texts[row]["context"][covered[span.first][0]:covered[span.last][1]].strip()
