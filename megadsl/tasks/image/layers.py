"""The layers around the trunk: patches and class token in front of it, the classifier behind it.

Shape letters: b micro-batch, c channels, H height, W width, p patch, P = c p^2, n positions, h hidden, k classes.
"""

import torch

from megadsl.model.activations import Activations
from megadsl.model.init import ParameterTag, tag


class PatchEmbedding(torch.nn.Module):
    """pixel_values [b, c, H, W] -> hidden [n, b, h]: one linear map of every patch, behind a class token where there is one.

    Args:
        std: of the map's weights.
        token_std: of the class token's numbers; None: there is none.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, channels: int, patch: int, std: float, token_std: float | None):
        super().__init__()
        self.patch, size, h = patch, channels * patch * patch, hidden_size
        self.projection = torch.nn.Linear(size, h, dtype=dtype)
        tag(self.projection.weight, ParameterTag("input_projection", (h, size), {"input_projection": std}))
        tag(self.projection.bias, ParameterTag("bias", (h,), {}))
        self.class_token = None
        if token_std is not None:
            self.class_token = torch.nn.Parameter(torch.empty(1, h, dtype=dtype))
            tag(self.class_token, ParameterTag("class_token", (1, h), {"class_token": token_std}))

    def forward(self, value: Activations) -> Activations:
        pixels, p = value["pixel_values"], self.patch
        b, c, height, width = pixels.shape
        patches = pixels.view(b, c, height // p, p, width // p, p).permute(2, 4, 0, 1, 3, 5).reshape(-1, b, c * p * p)
        hidden = self.projection(patches.to(self.projection.weight.dtype))
        if self.class_token is not None:
            hidden = torch.cat((self.class_token.unsqueeze(1).expand(1, b, -1), hidden))
        return value.without("pixel_values").replace(hidden=hidden)


class ImageClassifier(torch.nn.Module):
    """Logits [b, k] of the class token, which comes first, or of the mean over all positions."""

    def __init__(self, hidden_size: int, dtype: torch.dtype, classes: int, std: float, mean: bool, hidden_scale: float):
        super().__init__()
        self.mean, self.hidden_scale = mean, hidden_scale
        self.linear = torch.nn.Linear(hidden_size, classes, dtype=dtype)
        tag(self.linear.weight, ParameterTag("output_head", (classes, hidden_size), {"output_head": std}))
        tag(self.linear.bias, ParameterTag("bias", (classes,), {}))

    def forward(self, value: Activations) -> Activations:
        read = value.hidden.mean(dim=0) if self.mean else value.hidden[0]
        return value.without("hidden").replace(logits=self.linear(read if self.hidden_scale == 1.0 else read * self.hidden_scale))
