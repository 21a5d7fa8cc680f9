"""Finetuned encoders: BertFor... (Post-LN) and MegatronBertFor... (Pre-LN) SequenceClassification, MultipleChoice and QuestionAnswering.

BERT's pooler (a dense and tanh of the first token) stands in the trunk there, and in our head. Shape letters: b samples, s sequence,
k options, c outputs.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from megadsl.checkpoint.fold import fold, folding
from megadsl.checkpoint.huggingface.architecture import Architecture, special_ids
from megadsl.checkpoint.huggingface.bert import BERT, MEGATRON_BERT, trunk_tensors
from megadsl.checkpoint.huggingface.export import staged_folder, with_positions
from megadsl.checkpoint.huggingface.mapping import TensorMap
from megadsl.checkpoint.huggingface.tokenizer import write_tokenizer
from megadsl.checkpoint.huggingface.verify import TOLERANCE, offline_transformers, relative_error
from megadsl.config.model import ModelConfig
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.schemes.plan import SignalPlan

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


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, its file, and the rows of the padded word table."""

    tokenizer: Tokenizer
    file: Path
    padded_size: int


def export_finetuned(weights: dict[str, torch.Tensor], plan: SignalPlan, model: ModelConfig, head: Head, vocabulary: Vocabulary,
                     batch: dict[str, torch.Tensor], logits: torch.Tensor, folder: Path) -> tuple[str, float]:
    """Write `folder` and reload it -> (class of transformers, largest relative difference of its logits to ours).

    Args:
        weights: canonical name -> tensor.
        batch: real inputs: tokens, segments (0: padding) and, where there are any, tokentypes [b, s], or [b, k, s] of multiple choice.
        logits: ours of them: [b, c], [b, k], or of a span's start and end [b, s, 2].

    Raises:
        UserError: a part of the model has no place there, or the logits differ; `folder` is then not there.
    """
    trunk = BERT if model.norm_position == "post" else MEGATRON_BERT
    architecture = replace(trunk, name=trunk.name.replace("MaskedLM", head.kind))
    architecture.require(model)
    settings, tensors = _theirs(weights, plan, model, head, vocabulary, architecture)
    with staged_folder(folder) as staging:
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        (staging / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        write_tokenizer(vocabulary.tokenizer, vocabulary.file, staging)
        theirs = _their_logits(architecture.name, staging, batch)
        if head.kind == "QuestionAnswering":  # padding is no place for a span
            theirs, logits = (found[batch["segments"] > 0] for found in (theirs, logits))
        error = relative_error(theirs, logits)
        if not error <= TOLERANCE:
            raise UserError(f"The exported {architecture.name} gives other logits than our model (relative error {error:.1e}); nothing was written.")
    return architecture.name, error


def _theirs(weights: dict, plan: SignalPlan, model: ModelConfig, head: Head, vocabulary: Vocabulary,
            architecture: Architecture) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config.json, tensors by their names)."""
    folded = folding(plan, model)
    shape = model.model_copy(update={"layernorm_epsilon": model.layernorm_epsilon * folded.epsilon_factor})
    settings = {
        "architectures": [architecture.name], "model_type": architecture.model_type, "dtype": "float32", **architecture.settings(shape),
        "vocab_size": vocabulary.tokenizer.vocab_size, **special_ids(vocabulary.tokenizer), **head.settings(),
    }
    mapping = TensorMap(model, vocabulary.tokenizer.vocab_size, vocabulary.padded_size, architecture.biases(model))
    trunk_tensors(mapping)
    head.tensors(mapping)
    plain = dict(fold(with_positions(weights, model, plan), folded))
    return settings, {name: tensor.clone() for name, tensor in mapping.export(plain)}


@torch.inference_mode()
def _their_logits(name: str, folder: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model, report = getattr(offline_transformers(), name).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[key]:
            raise UserError(f"transformers loads {folder} with {key.replace('_', ' ')}, for example {sorted(map(str, report[key]))[0]}.")
    types = batch.get("tokentypes")
    found = model.eval()(input_ids=batch["tokens"], attention_mask=batch["segments"], token_type_ids=types)
    return found.logits if "logits" in found else torch.stack((found.start_logits, found.end_logits), dim=-1)
