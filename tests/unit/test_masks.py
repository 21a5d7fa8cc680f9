"""Who sees whom: causal, bidirectional and prefix attention over padded and packed sequences, and what a mask costs."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from megadsl.config.load import parse_config
from megadsl.config.model import ModelConfig
from megadsl.model.activations import Activations
from megadsl.model.core_attention import ScaledDotProductAttention
from megadsl.model.layer import transformer_config
from megadsl.model.masks import ALIGNMENT, Masks, Remembered, additive, blockwise, positions_in_segments, visibility, visible

MODEL = ModelConfig()
CPU = torch.device("cpu")
SEGMENTS = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
HIDDEN = torch.zeros(6, 2, 8)  # [s, b, h]


def flowing(hidden: torch.Tensor = HIDDEN, **context: torch.Tensor) -> Activations:
    return Activations(hidden=hidden, **context)


def loss_of(stack, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(stack.task.loss(stack(stack.definition.inputs_of(batch)), batch)) / 100


def seen_by(mask: torch.Tensor) -> torch.Tensor:
    """Additive [b, 1, s, t] -> [b, s, t] of visible keys."""
    assert set(mask.unique().tolist()) <= {0.0, -torch.inf}
    return (mask == 0)[:, 0]


def test_no_mask_where_sdpa_has_a_fast_path():
    assert Masks(MODEL, True, False)(flowing()) == (None, None) == Masks(MODEL, False, True)(flowing())
    assert Masks(MODEL, True, False)(flowing(segments=SEGMENTS, memory=HIDDEN)) == (None, None), "not isolated"


def test_rule_by_rule():
    """Every entry against the rule in words."""
    prefix = torch.tensor([3, 2])
    for causal in (False, True):
        for with_prefix in (False, True) if causal else (False,):
            context = {"prefix_length": prefix} if with_prefix else {}
            mask = seen_by(Masks(MODEL, causal, True)(flowing(segments=SEGMENTS, **context))[0])
            for b in range(2):
                for query in range(6):
                    for key in range(6):
                        expected = bool(SEGMENTS[b, query] == SEGMENTS[b, key])
                        if causal and key > query:
                            expected &= with_prefix and key < int(prefix[b])
                        assert bool(mask[b, query, key]) == expected, (causal, with_prefix, b, query, key)
            assert mask.any(dim=-1).all(), "a row without a key would give NaN"


def test_memory_is_seen_but_for_its_padding():
    source = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    own, memory = Masks(MODEL, True, False)(flowing(memory=torch.zeros(5, 2, 8), source_segments=source))
    assert own is None and seen_by(memory).expand(2, 6, 5)[0].tolist() == [[True, True, True, False, False]] * 6


def test_a_bias_is_part_of_the_mask():
    bias = torch.randn(1, 3, 6, 6, dtype=torch.bfloat16, requires_grad=True)
    own, _ = Masks(MODEL, True, True)(flowing(HIDDEN.bfloat16(), segments=SEGMENTS, position_bias=bias))
    seen = visible(visibility(True, 0, SEGMENTS, SEGMENTS), 2, 6, 6, CPU).expand(2, 3, 6, 6)
    assert torch.equal(own[seen], bias.expand(2, 3, 6, 6)[seen]) and (own[~seen] == -torch.inf).all() and own.requires_grad
    own, _ = Masks(MODEL, False, False)(flowing(HIDDEN.bfloat16(), position_bias=bias))
    assert torch.equal(own, bias)


def test_a_bias_behind_cached_tokens():
    """One new token after four sees all five; the prompt's first token sees itself."""
    own, _ = Masks(MODEL, True, False)(flowing(torch.zeros(1, 2, 8), position_bias=torch.zeros(1, 3, 1, 5)))
    assert own.tolist() == torch.zeros(1, 3, 1, 5).tolist()
    own, _ = Masks(MODEL, True, False)(flowing(torch.zeros(5, 2, 8), position_bias=torch.zeros(1, 3, 5, 5)))
    assert torch.equal(own[0, 0] == 0, torch.ones(5, 5).tril().bool())


def test_positions_start_again_in_every_segment():
    assert positions_in_segments(SEGMENTS).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


def test_a_mask_is_made_once_for_all_layers():
    made = []
    remembered = Remembered(lambda *arguments: made.append(arguments) or len(made))
    first, second = torch.zeros(2), torch.zeros(2)
    assert [remembered(first, 3), remembered(first, 3), remembered(second, 3), remembered(second, 4)] == [1, 1, 2, 3]
    assert remembered(second.detach(), 4) == 3, "the same memory in the hands of another object"
    second.fill_(1)
    assert remembered(second, 4) == 4, "a buffer that was written to is another batch"


@pytest.mark.parametrize("causal, prefix", [(True, None), (False, None), (True, torch.tensor([40, 3]))])
def test_flex_attention_is_given_the_same_rule(causal, prefix):
    """The mask of every pair, the blocks that flex_attention skips, and what it gives in place of SDPA."""
    length = 200
    segments = torch.randint(0, 4, (2, length), generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    sees = visibility(causal, 0, segments, segments, prefix)
    dense = visible(sees, 2, length, length, CPU)
    assert torch.equal(create_mask(sees, 2, None, length, length, device=CPU), dense)
    blocks = create_block_mask(sees, 2, None, length, length, device=CPU)
    core = ScaledDotProductAttention(transformer_config(MODEL), 1, None, "self").eval()
    query, key, value = (torch.randn(length, 2, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    with torch.no_grad():
        torch.testing.assert_close(core(query, key, value, blocks), core(query, key, value, additive(dense, torch.float32)))


def test_who_gets_flex_attention():
    fits = {"model": MODEL, "device": torch.device("cuda"), "dtype": torch.bfloat16, "queries": 128, "bias": None}
    assert blockwise(**fits)
    for change in ({"device": CPU}, {"dtype": torch.float32}, {"queries": 1}, {"bias": torch.zeros(1)},
                   {"model": ModelConfig(attention_dropout=0.1)}, {"model": ModelConfig(hidden_size=32, num_attention_heads=4)}):
        assert not blockwise(**fits | change), change
    own, _ = Masks(MODEL, True, True)(flowing(segments=SEGMENTS))
    assert not isinstance(own, BlockMask)


@pytest.mark.parametrize("length", [16, 50])
def test_rows_are_aligned_for_the_memory_efficient_kernel(length):
    mask = additive(torch.ones(2, 1, length, length, dtype=torch.bool), torch.bfloat16)
    assert mask.shape == (2, 1, length, length) and all(stride % ALIGNMENT == 0 for stride in mask.stride()[:-1])


def saved_bytes(stack, batch) -> dict[int, int]:
    """Storages of s x s numbers or more that a forward pass keeps for backward: bytes by address."""
    length, kept = batch["tokens"].size(1), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() >= 2 and tensor.size(-1) == tensor.size(-2) == length:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(stack, batch)
    loss.backward()
    return kept


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layers", [2, 6])
def test_layers_keep_one_mask_together(make_stack, layers, recompute, monkeypatch):
    """What is kept for backward of a packed batch does not grow with depth, and recomputation makes no mask again."""
    length = 48
    stack, _ = make_stack(parse_config({
        "model": {"num_layers": layers, "hidden_size": 32, "num_attention_heads": 4, "seq_length": length},
        "task": {"reset_attention_mask": True}, "training": {"recompute": recompute},
    }))
    made = []
    monkeypatch.setattr(Masks, "_make", lambda self, *arguments, make=Masks._make: made.append(1) or make(self, *arguments))
    tokens = torch.randint(5, 512, (2, length), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens, "segments": torch.tensor([[1] * 20 + [2] * 28, [1] * 40 + [0] * 8]), "labels": tokens,
             "loss_mask": torch.ones(2, length)}
    for masks in {layer.masks for layer in stack.modules() if hasattr(layer, "masks")}:
        masks._own = Remembered(masks._make)
    kept = saved_bytes(stack.train(), batch)
    assert list(kept.values()) == [2 * length * length * 4] and len(made) == 1


@pytest.mark.parametrize("family", ["decoder", "encoder"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_trained_bias_gets_the_gradient_of_all_layers(make_stack, family, recompute):
    """Combined with the mask once per stack, it still learns as if every layer had added it for itself."""
    values = {"model": {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "family": family,
                        "position_embedding_type": "relative"},
              "task": {"reset_attention_mask": True}, "training": {"recompute": recompute}}
    stack, _ = make_stack(parse_config(values))
    tokens = torch.randint(5, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens, "segments": torch.tensor([[1] * 6 + [2] * 10, [1] * 12 + [0] * 4]), "labels": tokens,
             "loss_mask": torch.ones(2, 16), "tokentypes": torch.zeros_like(tokens)}
    loss_of(stack.train(), batch).backward()
    table = next(parameter for name, parameter in stack.canonical_parameters() if "relative_attention_bias" in name)
    direction = torch.randn(table.shape, generator=torch.Generator().manual_seed(2))
    expected, step = (table.grad * direction).sum().item(), 1e-2
    found = []
    with torch.no_grad():
        for sign in (1, -1):
            table.add_(direction, alpha=sign * step)
            found.append(loss_of(stack, batch).item())
            table.sub_(direction, alpha=sign * step)
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(expected, rel=0.02, abs=1e-5) and abs(expected) > 1e-4


@pytest.mark.parametrize("family", ["decoder", "encoder"])
@pytest.mark.parametrize("positions", ["learned_absolute", "rope", "relative"])
def test_packed_documents_are_as_if_alone(make_stack, family, positions):
    """Logits of each document in a packed sequence equal those of the document read alone (relative, rotary and reset
    positions); without the option they do not."""
    shape = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "family": family,
             "position_embedding_type": positions}
    options = {"reset_attention_mask": True, "reset_position_ids": positions == "learned_absolute"}
    stack, _ = make_stack(parse_config({"model": shape, "task": options}))
    stack.eval()
    with torch.no_grad():
        for name, parameter in stack.canonical_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))  # it starts at 0, which would prove nothing
    tokens = torch.randint(5, 512, (1, 16), generator=torch.Generator().manual_seed(1))
    segments = torch.tensor([[1] * 6 + [2] * 8 + [0] * 2])
    with torch.no_grad():
        packed = stack({"tokens": tokens, "segments": segments})["logits"]
        for start, end in ((0, 6), (6, 14)):
            alone = stack({"tokens": tokens[:, start:end].contiguous()})["logits"]
            torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(stack({"tokens": tokens})["logits"][6:14], packed[6:14], atol=1e-3)
