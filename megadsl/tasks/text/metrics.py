"""The field's metrics, by torchmetrics (extra `text`): accuracy, F1 and Matthews' correlation of classes, correlations of values, exact
match and F1 of answers after SQuAD's normalisation.

All are shares or correlations, not percent. Shape letters: n samples, c classes.
"""

from types import ModuleType

import torch

from megadsl.errors import UserError


def torchmetrics(task: str) -> ModuleType:
    """The package; UserError where it is not installed."""
    try:
        import torchmetrics.functional as found
    except ImportError as error:
        raise UserError(f"Evaluating {task} needs the package torchmetrics: pip install 'megadsl[text]'.") from error
    return found


def class_metrics(task: str, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Of logits [n, c] and labels [n]: accuracy, Matthews' correlation, F1 (of label 1 where there are two, as GLUE; else its mean over
    the labels), and the share of the most frequent label."""
    functional, classes = torchmetrics(task), logits.size(1)
    predicted = logits.argmax(dim=1)
    arguments = {"task": "multiclass", "num_classes": classes}
    if classes == 2:
        f1 = {"f1": functional.f1_score(predicted, labels, task="binary")}
    else:
        f1 = {"macro_f1": functional.f1_score(predicted, labels, average="macro", **arguments)}
    found = {"accuracy": functional.accuracy(predicted, labels, average="micro", **arguments), **f1,
             "matthews_correlation": functional.matthews_corrcoef(predicted, labels, **arguments)}
    return {name: float(value) for name, value in found.items()} | {"majority_share": majority_share(labels)}


def value_metrics(task: str, predicted: torch.Tensor, values: torch.Tensor) -> dict[str, float]:
    """Of two [n]: Pearson's and Spearman's correlation, and the mean squared error."""
    functional = torchmetrics(task)
    return {
        "pearson": float(functional.pearson_corrcoef(predicted, values)), "spearman": float(functional.spearman_corrcoef(predicted, values)),
        "mean_squared_error": float((predicted - values).square().mean()),
    }


def majority_share(labels: torch.Tensor) -> float:
    """Share of the most frequent label: what a model that always says the same gets."""
    return float(labels.bincount().max()) / len(labels)


def answer_metrics(task: str, predictions: list[str], answers: list[list[str]]) -> dict[str, float]:
    """Exact match and F1 of predicted texts ("": no answer) against lists of right ones (empty: there is none), as SQuAD's scripts count
    them: lower case, without punctuation and articles, the best over the right answers."""
    squad = torchmetrics(task).text.squad
    rows = [({"prediction_text": text, "id": str(index)}, {"answers": {"text": right or [""], "answer_start": [0] * max(1, len(right))}, "id": str(index)})
            for index, (text, right) in enumerate(zip(predictions, answers, strict=True))]
    found = squad([row[0] for row in rows], [row[1] for row in rows])
    return {"exact_match": float(found["exact_match"]) / 100.0, "f1": float(found["f1"]) / 100.0}
