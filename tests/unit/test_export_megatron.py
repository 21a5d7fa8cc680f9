"""Megatron-core's own format: a stock GPTModel loads what we write and gives our logits, and it comes back as it went."""

import pytest
import torch
from export_models import MODELS, make_config, make_subject

from megadsl.checkpoint.store import open_checkpoint
from megadsl.checkpoint.weights import read_weights
from megadsl.errors import UserError


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_out_and_back(name, small_data, make_stack, tmp_path):
    from megadsl.checkpoint.megatron import export_megatron, import_megatron

    config = make_config(small_data, MODELS[name])
    source = make_subject(config, make_stack, vocab_size=512)
    assert export_megatron(source, tmp_path / "out") < 1e-5
    with pytest.raises(UserError, match="--trust"):
        import_megatron(tmp_path / "out", tmp_path / "back", config, trust=False)
    import_megatron(tmp_path / "out", tmp_path / "back", config, trust=True)
    back = dict(read_weights(open_checkpoint(tmp_path / "back").path))
    ours = source.weights
    # The plan is made anew without the data's statistics; it decides the start of gates only, lambda and beta are the same.
    assert back.keys() == ours.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(back[key], tensor, rtol=1e-5, atol=1e-7, msg=key)
    wrong = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": 5})})
    with pytest.raises(UserError, match="does not hold a GPTModel of this shape"):
        import_megatron(tmp_path / "out", tmp_path / "wrong", wrong, trust=True)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("model, key", [({"norm_position": "post"}, "norm_position"), ({"family": "encoder"}, "family"),
                                        ({"position_embedding_type": "relative"}, "position_embedding_type")])
def test_what_a_stock_model_cannot_hold(model, key, small_data, make_stack, tmp_path):
    from megadsl.checkpoint.megatron import export_megatron

    source = make_subject(make_config(small_data, {**MODELS["GPT2LMHeadModel"], **model}), make_stack, vocab_size=512)
    with pytest.raises(UserError, match=f"model.{key}"):
        export_megatron(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
