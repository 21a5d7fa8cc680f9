"""Small models of every architecture with weights like trained ones: norms, biases and tables away from where they start."""

from pathlib import Path

import torch

from megadsl.checkpoint.export_source import ExportSource
from megadsl.config import Config
from megadsl.config.load import parse_config
from megadsl.data.tokenizer import Tokenizer

# A small epsilon, because a plain model has a single one: with it the export is exact to fp32 rounding (test_export_fold.py).
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_layers": 3, "seq_length": 24, "hidden_dropout": 0.1,
         "layernorm_epsilon": 1e-8}
ENCODER = {"family": "encoder", **SMALL}
SEQ2SEQ = {"family": "encoder_decoder", **SMALL, "num_decoder_layers": 2, "decoder_seq_length": 16}

MODELS = {
    "GPT2LMHeadModel": SMALL,
    "LlamaForCausalLM": {
        **SMALL, "position_embedding_type": "rope", "normalization": "RMSNorm", "activation": "swiglu", "add_bias_linear": False,
        "num_query_groups": 2, "kv_channels": 16, "ffn_hidden_size": 48, "untie_embeddings_and_output_weights": True},
    "BertForMaskedLM": {**ENCODER, "norm_position": "post", "embedding_layernorm": True, "num_tokentypes": 2},
    "MegatronBertForMaskedLM": ENCODER,
    "T5ForConditionalGeneration": {
        **SEQ2SEQ, "position_embedding_type": "relative", "normalization": "RMSNorm", "add_bias_linear": False, "activation": "relu"},
    "BartForConditionalGeneration": {**SEQ2SEQ, "norm_position": "post", "embedding_layernorm": True, "layernorm_epsilon": 1e-5},
    "MBartForConditionalGeneration": {**SEQ2SEQ, "embedding_layernorm": True, "layernorm_epsilon": 1e-5},
}


def make_config(small_data, model: dict, scheme: str = "dslm", **task) -> Config:
    if model.get("family") == "encoder_decoder" and model.get("position_embedding_type") != "relative":
        task = {"corruption": "infilling", **task}
    return parse_config({
        "model": model, "scheme": scheme, "tokenizer": {"model": str(small_data.tokenizer)},
        "data": {"datasets": [str(small_data.dataset)]}, "task": task,
    })


def make_subject(config: Config, make_stack, perturbed: bool = True, vocab_size: int = 640) -> ExportSource:
    """A model of that configuration; `perturbed` moves every vector and small table as training would."""
    tokenizer = Tokenizer.load(config.tokenizer.model)
    stack, plan = make_stack(config, vocab_size)
    if perturbed:
        perturb(stack)
    return ExportSource(config, plan, stack.eval(), stack.definition, stack.task.export_sample(), tokenizer, Path(config.tokenizer.model),
                        vocab_size, {"Steps": "0", "Loss": "none"})


@torch.no_grad()
def perturb(stack) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in stack.canonical_parameters():
        if parameter.dim() == 1 or "relative" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            # A trained gate keeps its order of magnitude; norms and biases move by a tenth.
            parameter.add_(noise * (parameter.abs() if name.endswith("branch_scale") else 1.0))
