"""Finetuned encoders: BertFor... (Post-LN) and MegatronBertFor... (Pre-LN) SequenceClassification, MultipleChoice and QuestionAnswering.

BERT's pooler (a dense and tanh of the first token) stands in the trunk there, and in our head. Shape letters: b samples, s sequence,
k options, c outputs.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megadsl.checkpoint.export_source import ExportSource
from megadsl.checkpoint.fold import folding
from megadsl.checkpoint.huggingface.architecture import Architecture
from megadsl.checkpoint.huggingface.bert import BERT, MEGATRON_BERT, trunk_tensors
from megadsl.checkpoint.huggingface.export import SHARD_BYTES, staged_folder, their_model, write_shards
from megadsl.checkpoint.huggingface.mapping import TensorMap
from megadsl.checkpoint.huggingface.tokenizer import write_tokenizer
from megadsl.checkpoint.huggingface.verify import ANY_KEYS, load_class, offline_transformers, relative_error, require_close

HeadKind = Literal["SequenceClassification", "MultipleChoice", "QuestionAnswering"]


@dataclass(frozen=True)
class Head:
    """What stands behind the trunk; `labels`: names of the classes, none where a value is predicted."""

    kind: HeadKind
    labels: tuple[str, ...] = ()

    def settings(self) -> dict:
        """Its keys of config.json."""
        if self.kind != "SequenceClassification":
            return {}
        names = self.labels or ("LABEL_0",)
        return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)},
                "problem_type": "single_label_classification" if self.labels else "regression"}

    def tensors(self, tensors: TensorMap) -> None:
        output = "qa_outputs" if self.kind == "QuestionAnswering" else "classifier"
        for part in ("weight", "bias"):
            if self.kind != "QuestionAnswering":
                tensors.tensor(f"classifier.pooler.{part}", f"bert.pooler.dense.{part}")
            tensors.tensor(f"classifier.linear.{part}", f"{output}.{part}")


def export_finetuned(source: ExportSource, head: Head, logits: torch.Tensor, folder: Path) -> tuple[str, float]:
    """Write `folder` and reload it -> (class of transformers, largest relative difference of its logits to ours).

    Args:
        source: its sample are real inputs: tokens, segments (0: padding) and, where there are any, tokentypes [b, s], or [b, k, s] of
            multiple choice.
        logits: ours of them: [b, c], [b, k], or of a span's start and end [b, s, 2].

    Raises:
        UserError: a part of the model has no place there, or the logits differ; `folder` is then not there.
    """
    model = source.config.model
    architecture = _with_head(BERT if model.norm_position == "post" else MEGATRON_BERT, head)
    architecture.require(model)
    tensors, settings, _ = their_model(source, architecture, folding(source.plan, model))
    settings = {"architectures": [architecture.name], "model_type": architecture.model_type, "dtype": "float32", **settings}
    with staged_folder(folder) as staging:
        write_shards(staging, tensors, SHARD_BYTES)
        (staging / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        write_tokenizer(source.tokenizer, source.tokenizer_file, staging)
        theirs = _their_logits(architecture.name, staging, source.sample)
        if head.kind == "QuestionAnswering":  # padding is no place for a span
            theirs, logits = (found[source.sample["segments"] > 0] for found in (theirs, logits))
        error = relative_error(theirs, logits)
        require_close(architecture.name, error)
    return architecture.name, error


def _with_head(trunk: Architecture, head: Head) -> Architecture:
    """The class of transformers that has this head in place of the masked language model's."""
    def tensors(mapping: TensorMap, values: dict) -> None:
        trunk_tensors(mapping)
        head.tensors(mapping)

    return replace(trunk, name=trunk.name.replace("MaskedLM", head.kind), tensors=tensors,
                   settings=lambda model: {**trunk.settings(model), **head.settings()})


@torch.inference_mode()
def _their_logits(name: str, folder: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model = load_class(getattr(offline_transformers(), name), folder, ANY_KEYS)
    found = model(input_ids=batch["tokens"], attention_mask=batch["segments"], token_type_ids=batch.get("tokentypes"))
    return found.logits if "logits" in found else torch.stack((found.start_logits, found.end_logits), dim=-1)
