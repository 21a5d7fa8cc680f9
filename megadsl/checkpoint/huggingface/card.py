"""README.md of an exported model: what it is, how its signal was scaled, what it was trained on, how to load it."""

from collections import Counter

from megadsl.checkpoint.fold import Folding
from megadsl.checkpoint.huggingface.verify import Comparison
from megadsl.checkpoint.export_source import ExportSource
from megadsl.schemes.plan import SignalPlan

_AUTO = {
    "decoder": ("AutoModelForCausalLM", "text-generation"), "encoder": ("AutoModelForMaskedLM", "fill-mask"),
    "encoder_decoder": ("AutoModelForSeq2SeqLM", "text2text-generation"),
}


def model_card(source: ExportSource, architecture: str, folded: Folding, comparison: Comparison, dtype: str, size: int,
               notes: list[str]) -> str:
    """Markdown with the front matter that the hub reads."""
    model, config = source.config.model, source.config
    auto, task = _AUTO[model.family]
    parameters = sum(tensor.numel() for tensor in source.weights.values())
    layers = " + ".join(map(str, model.stack_layers.values()))
    accuracy = f"{comparison.error:.1e} over {comparison.positions} positions of real text (reloaded from disk, fp32)"
    if comparison.rounded_error is not None:
        accuracy += f"; {comparison.rounded_error:.1e} with the weights as stored in {dtype}"
    facts = {
        "Class": f"`{architecture}`, {layers} layers x {model.hidden_size}, {parameters:,} parameters, {dtype}, {size / 1e6:.1f} MB",
        "Scheme": f"`{source.plan.scheme}` (k = {config.scheme.k:g})" if source.plan.scheme.startswith("dslm") else f"`{source.plan.scheme}`",
        "Residual additions": "; ".join(_additions(source.plan)),
        "Training data": ", ".join(f"`{dataset.path}` (weight {dataset.weight:g})" for dataset in config.data.datasets) or "none",
        "Tokenizer": f"SentencePiece, {source.tokenizer.vocab_size} pieces, sha256 `{source.tokenizer.sha256[:16]}`",
        **source.facts,
        "Largest relative difference to megadsl's logits": accuracy,
    }
    lines = "\n".join(f"- {title}: {text}" for title, text in facts.items())
    remarks = "".join(f"\n- {note}" for note in notes)
    factors = [value for name, value in folded.factors.items() if "linear_" in name]
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [megadsl, {source.plan.scheme}]
---

# {model.family} of {layers} layers, trained with megadsl

{lines}

The scheme's scalars are folded into the weights: the last matrix of every branch is multiplied by {min(factors):.4g} to
{max(factors):.4g}, so no code other than that of transformers is needed. The function is the same; for further training note that an
optimizer sees other scales. (Epsilon of the norms: {model.layernorm_epsilon:g} in training, times {folded.epsilon_factor:.4g} here where the
class can set it.)
{remarks}

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

The tokenizer adds no special tokens, and reads "<mask>" in a text as six characters; load it with `split_special_tokens=False` to
write control pieces in texts.
"""


def _additions(plan: SignalPlan) -> list[str]:
    """lambda and beta by stack, as far as they are the same in all additions."""
    found = []
    for stack in dict.fromkeys(sublayer.stack for sublayer in plan.sublayers):
        own = [sublayer for sublayer in plan.sublayers if sublayer.stack == stack]
        pairs = Counter((s.residual_scale, s.branch_scale) for s in own)
        (residual, branch), _ = pairs.most_common(1)[0]
        trained = "" if own[0].gate == "fixed" else f" (at the start; trained {own[0].gate})"
        others = "" if len(pairs) == 1 else f" in most, {len(pairs)} different pairs"
        found.append(f"{len(own)} in the {stack}, {plan.norm_position}-norm, lambda {residual:.6g}, beta {branch:.6g}{trained}{others}")
    return found
