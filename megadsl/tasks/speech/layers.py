"""The front end: frames of 10 ms -> positions of the encoder, 4 times fewer.

Positions behind the end of an utterance are segment 0, which nothing real sees; what a convolution would carry over from there
(biases) is blanked, so an utterance gives the same numbers whatever it is padded to.
Shape letters: b micro-batch, n frames, s positions (n / 4), h hidden, c channels.
"""

import torch
import torch.nn.functional as F

from megadsl.model.activations import Activations
from megadsl.model.init import ParameterTag, tag
from megadsl.tasks.speech.features import NUM_BINS
from megadsl.tasks.speech.statistics import EDGE, HOP, KERNEL, STRIDE


class Convolutions(torch.nn.Module):
    """Two convolutions over time of width 5 and stride 2, a ReLU between them.

    Args:
        inner_std, std: of the weights of the first and of the second one.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, channels: int, inner_std: float, std: float):
        super().__init__()
        self.inner_weight = _parameter((channels, NUM_BINS, KERNEL), "inner_projection", inner_std, dtype)
        self.inner_bias = _bias(channels, dtype)
        self.weight = _parameter((hidden_size, channels, KERNEL), "input_projection", std, dtype)
        self.bias = _bias(hidden_size, dtype)

    def forward(self, value: Activations) -> Activations:
        """frames [b, n, 80], frame_counts [b] -> hidden [s, b, h], source_segments [b, s]."""
        frames, counts = value["frames"].to(self.weight.dtype).transpose(1, 2), value["frame_counts"]
        inner = F.relu(F.conv1d(frames, self.inner_weight, self.inner_bias, stride=HOP, padding=EDGE))
        real = torch.arange(inner.size(2), device=counts.device) < -(-counts // HOP)[:, None]
        hidden = F.conv1d(inner * real[:, None], self.weight, self.bias, stride=HOP, padding=EDGE)
        return _positions(value, hidden.permute(2, 0, 1).contiguous())


class StackedFrames(torch.nn.Module):
    """One matrix over 4 frames side by side."""

    def __init__(self, hidden_size: int, dtype: torch.dtype, std: float):
        super().__init__()
        self.weight = _parameter((hidden_size, STRIDE * NUM_BINS), "input_projection", std, dtype)
        self.bias = _bias(hidden_size, dtype)

    def forward(self, value: Activations) -> Activations:
        frames = value["frames"].to(self.weight.dtype)
        stacked = frames.reshape(len(frames), -1, STRIDE * NUM_BINS)
        return _positions(value, F.linear(stacked, self.weight, self.bias).transpose(0, 1).contiguous())


def _positions(value: Activations, hidden: torch.Tensor) -> Activations:
    counts = -(-value["frame_counts"] // STRIDE)
    segments = (torch.arange(hidden.size(0), device=counts.device) < counts[:, None]).long()
    return value.without("frames", "frame_counts").replace(hidden=hidden, source_segments=segments)


def _parameter(shape: tuple[int, ...], role: str, std: float, dtype: torch.dtype) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
    tag(parameter, ParameterTag(role, shape, {role: std}, decays=True))
    return parameter


def _bias(size: int, dtype: torch.dtype) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.empty(size, dtype=dtype))
    tag(parameter, ParameterTag("bias", (size,), {}))
    return parameter
