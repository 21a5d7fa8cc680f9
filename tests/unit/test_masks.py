"""Who sees whom: causal, bidirectional and prefix attention over padded and packed sequences."""

import pytest
import torch

from megadsl.config.load import parse_config
from megadsl.model.masks import Remembered, attention_mask, positions_in_segments

CPU = torch.device("cpu")
SEGMENTS = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])


def sees(mask: torch.Tensor) -> torch.Tensor:
    """[b, 1, s, t] of hidden keys -> [b, s, t] of visible ones."""
    return ~mask[:, 0]


def test_no_mask_where_sdpa_has_a_fast_path():
    assert attention_mask(True, 6, CPU) is None and attention_mask(False, 6, CPU) is None
    # A bias takes the mask's slot, so causality must then be in the mask.
    biased = sees(attention_mask(True, 4, CPU, always=True))[0]
    assert torch.equal(biased, torch.ones(4, 4).tril().bool())
    assert attention_mask(False, 4, CPU, always=True) is None


def test_rule_by_rule():
    """Every entry against the rule in words."""
    prefix = torch.tensor([3, 2])
    for causal in (False, True):
        for with_prefix in (False, True) if causal else (False,):
            mask = sees(attention_mask(causal, 6, CPU, SEGMENTS, SEGMENTS, prefix if with_prefix else None))
            for b in range(2):
                for query in range(6):
                    for key in range(6):
                        expected = bool(SEGMENTS[b, query] == SEGMENTS[b, key])
                        if causal and key > query:
                            expected &= with_prefix and key < int(prefix[b])
                        assert bool(mask[b, query, key]) == expected, (causal, with_prefix, b, query, key)
            assert mask.any(dim=-1).all(), "a row without a key would give NaN"


def test_memory_is_seen_but_for_its_padding():
    source = torch.tensor([[1, 1, 1, 0, 0]])
    assert sees(attention_mask(False, 4, CPU, source)).squeeze().tolist() == [True, True, True, False, False]


def test_positions_start_again_in_every_segment():
    assert positions_in_segments(SEGMENTS).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


def test_a_mask_is_made_once_for_all_layers():
    made = []
    remembered = Remembered(lambda *arguments: made.append(arguments) or len(made))
    first, second = torch.zeros(2), torch.zeros(2)
    assert [remembered(first, 3), remembered(first, 3), remembered(second, 3), remembered(second, 4)] == [1, 1, 2, 3]


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
