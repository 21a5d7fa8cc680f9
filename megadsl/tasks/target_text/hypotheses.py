"""What a model writes for a split, by beam search on as many ranks as there are, and how good that is."""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megadsl.data.progress_bar import progress
from megadsl.inference.beam_search import beam_search
from megadsl.inference.load import TrainedModel
from megadsl.inference.seq2seq import Decoding
from megadsl.parallel.groups import gather_over_data_ranks
from megadsl.tasks.target_text.samples import Chosen
from megadsl.tasks.target_text.scores import scores_of
from megadsl.tasks.target_text.stored import StoredTexts
from megadsl.tasks.task import EvaluationRequest

if TYPE_CHECKING:
    from megadsl.tasks.target_text.task import TargetTextTask

DEFAULT_BEAMS = 5


def evaluate_hypotheses(task: "TargetTextTask", model: TrainedModel, stored: StoredTexts, chosen: Chosen,
                        request: EvaluationRequest) -> dict[str, float | int | str]:
    """The scores of the hypotheses, and of a baseline that writes the train split's most frequent target whatever the source is;
    request.hypotheses: a JSON Lines file of id, reference, hypothesis and score that the main rank writes."""
    written = hypotheses(task, model, chosen, request)
    texts = stored.texts(request.split)
    rows = [{**texts[number], "hypothesis": text, "score": score} for number, (text, score) in sorted(written.items())]
    if request.hypotheses and model.is_main:
        lines = [json.dumps({"id": row["id"], "reference": row["tgt_text"], "hypothesis": row["hypothesis"], "score": row["score"]},
                            ensure_ascii=False) for row in rows]
        Path(request.hypotheses).write_text("\n".join(lines) + "\n", encoding="utf-8")
    references = [row["tgt_text"] for row in rows]
    learnt = Counter(row["tgt_text"] for row in stored.texts("train"))
    constant = max(sorted(learnt), key=learnt.get, default="")
    found = scores_of(task.options.scores, [row["hypothesis"] for row in rows], references)
    baseline = scores_of(task.options.scores, [constant] * len(rows), references)
    return {**found, **{f"{name}_of_most_frequent_target": value for name, value in baseline.items() if not isinstance(value, str)},
            "num_beams": request.num_beams or DEFAULT_BEAMS}


def hypotheses(task: "TargetTextTask", model: TrainedModel, chosen: Chosen, request: EvaluationRequest) -> dict[int, tuple[str, float]]:
    """{number of the example: (text, score)} of all of `chosen`; on all ranks together, each gets the result."""
    beams, tokenizer = request.num_beams or DEFAULT_BEAMS, task.tokenizer
    penalty = 1.0 if request.length_penalty is None else request.length_penalty
    size = max(1, request.batch_tokens // (task.model.seq_length + beams * task.model.target_length))
    starts, found = range(0, len(chosen), size), {}
    mine = starts[model.coordinate.data::model.topology.data]
    names = [name for name in model.definition.inputs if name != "target_tokens"]
    with progress("translating", len(mine), enabled=model.is_main) as advance, torch.inference_mode():
        for start in mine:
            numbers = chosen.numbers[start:start + size]
            batch = task.collate([chosen[index] for index in range(start, start + len(numbers))])
            decoding = Decoding(model, {name: batch[name].to(model.device) for name in names}, beams)
            results = beam_search(decoding, tokenizer.bos, tokenizer.eos, tokenizer.vocab_size, task.model.target_length, beams, penalty,
                                  early_stopping=True)
            found |= {number: (tokenizer.decode(best[0][1]), best[0][0]) for number, best in zip(numbers, results, strict=True)}
            advance(1)
    return {number: result for part in gather_over_data_ranks(found) for number, result in part.items()}
