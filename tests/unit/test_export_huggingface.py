"""Export to transformers: every architecture gives our logits after a reload from disk, and what cannot be expressed is refused."""

import json
import re

import pytest
from safetensors.torch import load_file

from export_models import ENCODER, MODELS, SEQ2SEQ, SMALL, make_config, make_subject
from megadsl.checkpoint.huggingface import export
from megadsl.checkpoint.huggingface.export import export_huggingface
from megadsl.errors import UserError

GPT2, LLAMA = MODELS["GPT2LMHeadModel"], MODELS["LlamaForCausalLM"]
T5, BART = MODELS["T5ForConditionalGeneration"], MODELS["BartForConditionalGeneration"]

VARIANTS = {
    "gpt2-untied-tanh": ("GPT2LMHeadModel", {**GPT2, "untie_embeddings_and_output_weights": True, "activation": "tanh_gelu"}, "dslm"),
    "gpt2-no-biases-sinusoidal": ("GPT2LMHeadModel", {**GPT2, "add_bias_linear": False, "position_embedding_type": "sinusoidal"}, "vanilla"),
    "gpt2-layernorm-scaling": ("GPT2LMHeadModel", {**GPT2, "activation": "squared_relu"}, "layernorm_scaling"),
    "gpt2-layerscale": ("GPT2LMHeadModel", {**GPT2, "activation": "silu"}, "layerscale"),
    "gpt2-usual-epsilon": ("GPT2LMHeadModel", {**GPT2, "layernorm_epsilon": 1e-5}, "dslm"),
    "gpt2-completep": ("GPT2LMHeadModel", GPT2, "completep"),
    "llama-tied-biases-geglu": (
        "LlamaForCausalLM", {**LLAMA, "untie_embeddings_and_output_weights": False, "add_bias_linear": True, "activation": "geglu"}, "dslm"),
    "bert-untied-one-type": (
        "BertForMaskedLM", {**MODELS["BertForMaskedLM"], "num_tokentypes": 0, "untie_embeddings_and_output_weights": True}, "deepnorm"),
    "t5-untied-geglu": (
        "T5ForConditionalGeneration", {**T5, "untie_embeddings_and_output_weights": True, "activation": "geglu", "kv_channels": 16}, "dslm"),
    "bart-deepnorm": ("BartForConditionalGeneration", {**BART, "decoder_seq_length": 40}, "deepnorm"),
}


@pytest.mark.parametrize("case", [*MODELS, *VARIANTS])
def test_same_logits_from_disk(case, small_data, make_stack, tmp_path):
    architecture, model, scheme = VARIANTS.get(case, (case, MODELS.get(case), "dslm"))
    source = make_subject(make_config(small_data, model, scheme), make_stack)
    result = export_huggingface(source, tmp_path / "out")
    assert result.architecture == architecture
    # fp32 rounding of 6 to 15 additions, and what an epsilon of 1e-5 costs at width 32; a wrong scale of 1 % shows up above 1e-4.
    tolerance = 1e-5 if source.config.model.layernorm_epsilon < 1e-6 else 1e-4
    assert result.comparison.error < tolerance and result.comparison.positions > 30 and result.comparison.texts > 15
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["architectures"] == [architecture] and settings["vocab_size"] == source.tokenizer.vocab_size
    card = (tmp_path / "out" / "README.md").read_text()
    assert scheme in card and "dataset" in card and "Auto" in card


REFUSALS = [
    ({**GPT2, "qk_layernorm": True}, "dslm", "model.qk_layernorm=true has no place in GPT2LMHeadModel, which has false"),
    ({**GPT2, "norm_position": "post"}, "dslm", "model.norm_position=post"),
    ({**GPT2, "attention_logit_softcap": 50.0}, "dslm", "model.attention_logit_softcap=50.0 has no place in GPT2LMHeadModel, which has 0.0"),
    ({**T5, "attention_logit_softcap": 50.0}, "dslm", "model.attention_logit_softcap=50.0"),
    ({**GPT2, "num_query_groups": 2}, "dslm", "model.num_query_groups=2"),
    ({**GPT2, "kv_channels": 16}, "dslm", "model.kv_channels=16"),
    ({**GPT2, "activation": "swiglu"}, "dslm", "model.activation=swiglu"),
    (GPT2, "rezero", "scheme.name=rezero has no norms"),
    ({**LLAMA, "normalization": "LayerNorm"}, "dslm", "model.normalization=LayerNorm has no place in LlamaForCausalLM, which has RMSNorm"),
    ({**ENCODER, "norm_position": "post"}, "dslm", "model.embedding_layernorm=false has no place in BertForMaskedLM, which has true"),
    ({**BART, "layernorm_epsilon": 1e-6}, "dslm", "model.layernorm_epsilon=1e-06"),
    ({**T5, "add_bias_linear": True}, "dslm", "model.add_bias_linear=true"),
    ({**SEQ2SEQ, "position_embedding_type": "rope"}, "dslm", "model.position_embedding_type=rope"),
]


@pytest.mark.parametrize("model, scheme, sentence", REFUSALS, ids=[sentence.split()[0] for *_, sentence in REFUSALS])
def test_what_cannot_be_expressed_is_refused(model, scheme, sentence, small_data, make_stack, tmp_path):
    source = make_subject(make_config(small_data, model, scheme), make_stack, perturbed=False)
    with pytest.raises(UserError, match=re.escape(sentence)):
        export_huggingface(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_wrong_export_is_found_and_leaves_nothing_behind(small_data, make_stack, tmp_path, monkeypatch):
    """The verification is not a formality: one beta that is folded with 1 % too much is seen."""
    source = make_subject(make_config(small_data, SMALL), make_stack)
    right = export.folding

    def wrong(plan, model):
        folded = right(plan, model)
        folded.factors["decoder.1.mlp.linear_fc2"] *= 1.01
        return folded

    monkeypatch.setattr(export, "folding", wrong)
    with pytest.raises(UserError, match="gives other logits"):
        export_huggingface(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bf16_in_several_files(small_data, make_stack, tmp_path):
    source = make_subject(make_config(small_data, SMALL), make_stack)
    result = export_huggingface(source, tmp_path / "out", dtype="bf16", shard_bytes=20_000)
    # bf16 keeps 8 bits: single weights are wrong by up to 2^-9, and the mapping itself is checked in fp32.
    assert result.comparison.error < 1e-5 < result.comparison.rounded_error < 0.05
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for file in files for t in load_file(file).values())


def test_an_existing_folder_is_not_overwritten(small_data, make_stack, tmp_path):
    (tmp_path / "mine").write_text("precious")
    source = make_subject(make_config(small_data, SMALL), make_stack)
    with pytest.raises(UserError, match="exists already"):
        export_huggingface(source, tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"
