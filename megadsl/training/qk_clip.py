"""QK-clip (Kimi K2, arXiv 2507.20534; Megatron-core's optimizer/qk_clip.py): after a step, heads whose largest attention score was
above a threshold get smaller query and key weights.

Per group of heads that share a key head, eta = min(1, threshold / largest score of the step); rows of the query weights and biases
are multiplied by eta^alpha, those of the keys by eta^(1 - alpha), so that every score is multiplied by eta. Scores are searched in
every forward pass of training (model/core_attention.py), each micro-batch, data rank and cross-attention included. What is scaled
are the optimizer's own fp32 weights, whatever part of them a rank holds (state.py), so it is right under tensor and pipeline
parallelism and ZeRO 0 to 3; Adam's moments stay, as in Megatron-core.

Shape letters: n heads and g query groups of this rank, d head size.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megadsl.config.training import OptimizerConfig
from megadsl.model.layer import Layer
from megadsl.parallel.groups import data_group, largest_over_ranks
from megadsl.training.state import EngineState


class QKClip:
    """The attentions of the layers that this rank holds; making it switches their search for the largest score on."""

    def __init__(self, model: torch.nn.Module, state: EngineState, options: OptimizerConfig, device: torch.device):
        self._threshold, self._alpha, self._state, self._device = options.qk_clip_threshold, options.qk_clip_alpha, state, device
        self._attentions = [
            attention for layer in model.modules() if isinstance(layer, Layer) for attention in layer.attentions()
        ]
        self._forget()

    def _forget(self) -> None:
        for attention in self._attentions:
            heads = attention.num_attention_heads_per_partition
            attention.core_attention.largest_scores = torch.full((heads,), -torch.inf, device=self._device)

    @torch.no_grad()
    def after_step(self, clip: bool) -> float:
        """The largest score since the last call, of all ranks; on all ranks together. `clip`: and scale what was too large (a step
        that was skipped left the weights as they were, with scores that may not be numbers)."""
        largest = torch.cat([attention.core_attention.largest_scores for attention in self._attentions])
        if dist.get_world_size(data_group()) > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=data_group())
        largest_here = largest.max().item()
        # All data ranks hold the same scores, so they agree on gathering the weights anew.
        if clip and largest_here > self._threshold:
            by_attention = largest.split([attention.num_attention_heads_per_partition for attention in self._attentions])
            self._state.scale_rows({
                parameter: factor for attention, scores in zip(self._attentions, by_attention, strict=True)
                for parameter, factor in self._factors(attention, scores)
            })
        self._forget()
        return largest_over_ranks(largest_here, self._device)

    def _factors(self, attention: torch.nn.Module, scores: torch.Tensor) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """(parameter, factor of every row of this rank's shard) of one attention whose heads had these largest scores [n]."""
        groups, size = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        eta = (self._threshold / scores.view(groups, -1).amax(dim=1).clamp(min=self._threshold)).unsqueeze(1)  # [g, 1]
        queries = (eta ** self._alpha).expand(groups, scores.numel() // groups * size)
        keys = (eta ** (1.0 - self._alpha)).expand(groups, size)
        values = torch.ones_like(keys)
        if hasattr(attention, "linear_qkv"):
            rows = {attention.linear_qkv: (queries, keys, values)}
        else:
            rows = {attention.linear_q: (queries,), attention.linear_kv: (keys, values)}
        for linear, parts in rows.items():
            factor = torch.cat(parts, dim=1).flatten()
            yield linear.weight, factor
            if linear.bias is not None:
                yield linear.bias, factor
