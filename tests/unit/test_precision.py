"""One precision through a whole model: what CUDA's kernels demand, observed on a CPU, which would tolerate more."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadsl.config.load import parse_config
from megadsl.model.init import initialize
from megadsl.model.precision import DTYPES, prepare_precision
from megadsl.model.stack import SequentialModel
from megadsl.parallel.rng import seed_micro_batch
from megadsl.tasks.planning import plan_for_run
from megadsl.tasks.registry import task_of

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
VARIANTS = {
    "decoder": {"model": {}},
    "decoder, packed, sinusoidal": {"model": {"position_embedding_type": "sinusoidal"}, "task": {"reset_attention_mask": True}},
    "decoder, gated, grouped": {"model": {
        "position_embedding_type": "rope", "activation": "swiglu", "num_query_groups": 2, "qk_layernorm": True,
        "normalization": "RMSNorm", "hidden_dropout": 0.1, "attention_dropout": 0.1}},
    "decoder, rezero": {"model": {"position_embedding_type": "none"}, "scheme": "rezero"},
    "decoder, layerscale": {"model": {}, "scheme": "layerscale"},
    "encoder, post-norm": {"model": {
        "family": "encoder", "norm_position": "post", "num_tokentypes": 2, "embedding_layernorm": True},
        "task": {"sentence_order": True}},
    "encoder, relative": {"model": {"family": "encoder", "position_embedding_type": "relative"}},
    "encoder_decoder, relative": {"model": {"family": "encoder_decoder", "position_embedding_type": "relative", "qk_layernorm": True}},
    "recomputed": {"model": {}, "training": {"recompute": True}},
}


class OnePrecision(TorchDispatchMode):
    """Collects every operation of a forward pass in which a parameter or buffer is used, or which is not elementwise, and which
    meets two floating dtypes.

    Elementwise operations promote on every device; kernels such as layer_norm, addmm or attention do not on a GPU.
    """

    COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        held = [*model.named_parameters(), *model.named_buffers()]
        self.names = {tensor.untyped_storage().data_ptr(): name for name, tensor in held}
        self.seen, self.mixed, self.within = set(), [], False
        for name, module in model.named_modules():
            # On a CPU it is written out in fp32 steps; on a GPU one kernel takes input and weight.
            if isinstance(module, torch.nn.RMSNorm):
                module.register_forward_pre_hook(partial(self._enter, name))
                module.register_forward_hook(self._leave)

    def _enter(self, name: str, module: torch.nn.Module, arguments: tuple) -> None:
        self.within = True
        if arguments[0].dtype != module.weight.dtype:
            self.mixed.append(("rms_norm", [name], [str(arguments[0].dtype), str(module.weight.dtype)]))

    def _leave(self, module, arguments, output) -> None:
        self.within = False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, torch.Tensor)]
        floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim()]
        held = {self.names.get(tensor.untyped_storage().data_ptr()) for tensor in floating} - {None}
        self.seen |= held
        if not self.within and function not in self.COPIES and len({tensor.dtype for tensor in floating}) > 1:
            if held or torch.Tag.pointwise not in function.tags:
                self.mixed.append((str(function), sorted(held), [str(tensor.dtype) for tensor in floating]))
        return function(*arguments, **(keywords or {}))


def build(sections: dict, precision: str, prepared: bool = True):
    values = {**sections, "model": {**SHAPE, **sections["model"]},
              "training": {**sections.get("training", {}), "precision": precision}}
    if precision != "fp32":
        values["parallel"] = {"zero_stage": 1}
    config = parse_config(values)
    definition = task_of(config).define_model(plan_for_run(config), 512)
    model = SequentialModel(definition.entries)
    if prepared:
        prepare_precision(model, precision)
    initialize(model.canonical_parameters(), 1, 0, 1)
    seed_micro_batch(1, 0, 0)
    return model.train(), definition


def batch(definition, length: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randint(0, 2, (2, length), generator=generator) for name in definition.inputs}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_parameter_meets_another_dtype(one_process, variant):
    model, definition = build(VARIANTS[variant], "bf16")
    watch = OnePrecision(model)
    with watch:
        model(batch(definition))
    assert not watch.mixed
    assert watch.seen == set(watch.names.values()), "every parameter and buffer was met"


def test_the_watch_sees_what_a_gpu_would_refuse(one_process):
    """The rule's negation: norms left in fp32, as Megatron-core and torch make them."""
    model, definition = build(VARIANTS["decoder"], "bf16", prepared=False)
    watch = OnePrecision(model)
    with watch, torch.no_grad():
        model(batch(definition))
    assert any("layer_norm" in function for function, *_ in watch.mixed)


@pytest.mark.parametrize("precision", DTYPES)
def test_deepspeeds_rule_is_ours(one_process, precision):
    """DeepSpeed casts nothing that prepare_precision has not cast already."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    model, _ = build(VARIANTS["encoder_decoder, relative"], precision)
    ours = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine.__dict__["module"] = model
    engine._cast_module_mixed_precision(None if precision == "fp32" else DTYPES[precision], None, False)
    assert ours == {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert set(ours.values()) == {DTYPES[precision]}
