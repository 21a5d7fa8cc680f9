"""Depth profiles: the signal of a whole model, sublayer by sublayer, forward and backward, at two levels of detail.

"matrix" tracks every position (recursion.py), "scalar" one variance and one correlation a sublayer (scalar.py). An
encoder_decoder runs its encoder first; the encoder's gradient is what the cross-attentions of all decoder layers send back.

The gradient starts at the input of the head with variance 1 and the token correlation of the cross-entropy gradient at
initialisation (inputs.cross_entropy_gradient; with masked-token prediction on a share f of positions it is f times that). BERT's
transform W -> phi -> norm in front of the logits decorrelates it by E phi'phi'(r) / E phi'^2, r the correlation of its input.
What of it lies along the normed state ends at the norm that made that state, the last one of the stack or the transform's.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from megadsl.theory.grid import Gram, Grid, means, uniform_grid
from megadsl.theory.inputs import cross_entropy_overlaps
from megadsl.theory.quadrature import dual_map
from megadsl.theory.recursion import MatrixRecursion
from megadsl.theory.scalar import ScalarRecursion
from megadsl.theory.shape import Embedding, Head, ModelShape, Sublayer

# Share of positions that a masked-language-model objective predicts (BERT).
MASKED_SHARE = 0.15
# BERT's transform is no gated unit.
UNGATED = {"swiglu": "silu", "geglu": "gelu"}


@dataclass(frozen=True)
class Prediction:
    """The residual stream at one depth, per coordinate, averaged over positions (pairs of positions for correlations)."""

    forward_variance: float
    correlation: float
    gradient_variance: float
    gradient_correlation: float

    def values(self) -> tuple[float, float, float, float]:
        return self.forward_variance, self.correlation, self.gradient_variance, self.gradient_correlation


@dataclass(frozen=True)
class DepthProfile:
    """A whole model: after the embedding, after every sublayer (all stds filled in), and at the input of the head.

    positions: by stack, arrays "position" [B], "forward_variance" and "gradient_variance" [1 + sublayers, B] (matrix level only).
    entering: (variance, token correlation) of the gradient that passes on from the head, without what the last norm takes away.
    """

    embedding: Prediction
    sublayers: tuple[Sublayer, ...]
    predictions: tuple[Prediction, ...]
    final: Prediction
    positions: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    entering: tuple[float, float] = (1.0, 0.0)

    def to_dict(self) -> dict:
        """The object of the command-line contract."""
        rows = [
            {"stack": sublayer.stack, "layer": sublayer.layer, "kind": sublayer.kind, **asdict(prediction),
             "residual_scale": sublayer.residual_scale, "branch_scale": sublayer.branch_scale}
            for sublayer, prediction in zip(self.sublayers, self.predictions, strict=True)
        ]
        return {"sublayers": rows, "embedding": asdict(self.embedding), "final": asdict(self.final)}

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def save_npz(self, path: Path | str) -> None:
        """Arrays by sublayer (index 0: embedding), and by position and stack as `decoder_forward_variance` and so on."""
        points = (self.embedding, *self.predictions)
        arrays = {name: np.array([getattr(point, name) for point in points]) for name in Prediction.__dataclass_fields__}
        for stack, values in self.positions.items():
            arrays.update({f"{stack}_{name}": value for name, value in values.items()})
        np.savez(path, **arrays)

    def figure(self, path: Path | str, name: str = "predicted") -> None:
        """Draw the profile (theory/figures.py)."""
        from megadsl.theory.figures import depth_figure

        depth_figure({name: [self.embedding, *self.predictions]}, path)


def propagate(shape: ModelShape, embedding: Embedding, sublayers: Sequence[Sublayer], vocab_size: int,
              level: Literal["matrix", "scalar"] = "matrix", head: Head | None = None,
              gradient_correlation: float | None = None, read_position: int | None = None,
              target_embedding: Embedding | None = None) -> DepthProfile:
    """Predict the signal of a model; stds that a sublayer leaves open are solved for unit branches.

    `gradient_correlation` replaces the one that the cross-entropy gradient would have; `read_position` is the only one that the head
    reads, so that it has all of the gradient (None: all positions are alike to it); `target_embedding` is the decoder's where the two
    stacks of an encoder_decoder read different things.
    """
    run = _matrix if level == "matrix" else _scalar
    stacks = [name for name in ("encoder", "decoder") if any(sublayer.stack == name for sublayer in sublayers)]
    grouped = {name: [sublayer for sublayer in sublayers if sublayer.stack == name] for name in stacks}

    def start(correlation: float) -> tuple[float, tuple[float, float]]:
        if gradient_correlation is not None:
            return gradient_correlation, (1.0, gradient_correlation)
        return _head_gradient(shape, embedding, vocab_size, head or Head(), correlation)

    embeddings = {name: target_embedding if target_embedding and name == "decoder" and "encoder" in grouped else embedding for name in grouped}
    return run(shape, embeddings, grouped, start, read_position)


def _head_gradient(shape: ModelShape, embedding: Embedding, vocab_size: int, head: Head,
                   r: float) -> tuple[float, tuple[float, float]]:
    """(token correlation of the gradient at a head whose input has token correlation r, DepthProfile.entering)."""
    share = head.predicted_share
    if share is None:
        share = MASKED_SHARE if shape.family == "encoder" else 1.0
    width = float(shape.hidden_size)
    below = math.inf if shape.final_norm or shape.outer_norm else width
    if head.dense_std is not None:
        unit, _ = dual_map(UNGATED.get(shape.activation, shape.activation), math.sqrt(shape.hidden_size) * head.dense_std)
        share *= float(unit.derivative(np.array(r))) / unit.gain
        # LayerNorm takes away the mean over features, which every token has.
        mean = float(unit.overlap(np.array(0.0))) if shape.normalization == "LayerNorm" else 0.0
        r = (float(unit.overlap(np.array(r))) - mean) / (unit.second_moment - mean)
        width = below = math.inf
    repeats = embedding.repeat_probability if head.repeat_probability is None else head.repeat_probability
    moments = [cross_entropy_overlaps(d, vocab_size, repeats, r, head.logit_variance, head.z_loss, head.label_smoothing) for d in (width, below)]
    at_head, entering = (min(1.0, max(0.0, share * other / same)) for same, other in moments)
    return at_head, (moments[1][0] / moments[0][0], entering)


def _matrix(shape: ModelShape, embeddings: dict[str, Embedding], grouped: dict[str, list[Sublayer]], start,
            read_position: int | None) -> DepthProfile:
    stacks: list[MatrixRecursion] = []
    memory = None
    for name, sublayers in grouped.items():
        stack = MatrixRecursion(shape, name, memory, uniform_grid(shape.length) if memory is not None else None,
                                differ=embeddings[name].positions is not None)
        final = stack.final(stack.forward(stack.embed(embeddings[name]), sublayers))
        second, overlap = means(stack.grid, final)
        # A decoder attends to all of the memory alike, so its mean overlaps are all that counts.
        memory = Gram(np.full((1, 1), overlap), np.full(1, second))
        stacks.append(stack)
    last = stacks[-1]
    r_g, entering = start(overlap / second)
    gradient, found = _at_head(last.grid, *entering, read_position), {}
    for stack in reversed(stacks):
        found[stack.name], at_memory = stack.backward(gradient)
        if at_memory is not None:
            encoder_blocks = len(stacks[0].grid.sizes)
            gradient = Gram(np.full((encoder_blocks, encoder_blocks), float(at_memory.off[0, 0])),
                            np.full(encoder_blocks, float(at_memory.diag[0])))
    points, solved, positions = [], [], {}
    for stack in stacks:
        streams = [stack.start, *(step.output for step in stack.steps)]
        points.append([_prediction(stack, stream, gradient) for stream, gradient in zip(streams, found[stack.name], strict=True)])
        solved += [step.sublayer for step in stack.steps]
        positions[stack.name] = {
            "position": stack.grid.centres, "forward_variance": np.stack([stream.diag for stream in streams]),
            "gradient_variance": np.stack([gradient.diag for gradient in found[stack.name]]),
        }
    final = Prediction(second, overlap / second, 1.0, r_g)
    return DepthProfile(points[0][0], tuple(solved), tuple(p for part in points for p in part[1:]), final, positions, entering)


def _at_head(grid: Grid, variance: float, correlation: float, read_position: int | None) -> Gram:
    """The gradient that enters the last stack, of mean second moment `variance`."""
    blocks = len(grid.sizes)
    if read_position is None:
        return Gram(np.full((blocks, blocks), variance * correlation), np.full(blocks, variance))
    read = np.arange(blocks) == np.searchsorted(grid.starts, read_position % grid.length, side="right") - 1
    return Gram(np.zeros((blocks, blocks)), np.where(read, variance * grid.length / grid.sizes, 0.0))


def _prediction(stack: MatrixRecursion, stream: Gram, gradient: Gram) -> Prediction:
    second, overlap = means(stack.grid, stream)
    gradient_second, gradient_overlap = means(stack.grid, gradient)
    return _point(second, overlap, gradient_second, gradient_overlap)


def _point(q: float, c: float, q_g: float, c_g: float) -> Prediction:
    # No gradient reaches the encoder of a model whose branches are switched off (ReZero).
    return Prediction(q, c / q, q_g, c_g / q_g if q_g else 0.0)


def _scalar(shape: ModelShape, embeddings: dict[str, Embedding], grouped: dict[str, list[Sublayer]], start,
            read_position: int | None) -> DepthProfile:
    # At this level positions are exchangeable: which one the head reads is in the gradient's correlation alone.
    stacks: list[ScalarRecursion] = []
    memory = None
    for name, sublayers in grouped.items():
        stack = ScalarRecursion(shape, name, memory, shape.length if memory is not None else 0)
        positions = MatrixRecursion(shape, name, differ=embeddings[name].positions is not None)
        q, c = means(positions.grid, positions.embed(embeddings[name]))
        memory = q, r = stack.final(*stack.forward(q, c / q, sublayers))
        stacks.append(stack)
    r_g, entering = start(r)
    gradient, found = (entering[0], entering[0] * entering[1]), {}
    for stack in reversed(stacks):
        found[stack.name], gradient = stack.backward(*gradient)
    points, solved = [], []
    for stack in stacks:
        states = [stack.start, *((step.q, step.r) for step in stack.steps)]
        points.append([_point(q, q * r, q_g, c_g) for (q, r), (q_g, c_g) in zip(states, found[stack.name], strict=True)])
        solved += [step.sublayer for step in stack.steps]
    final = Prediction(q, r, 1.0, r_g)
    return DepthProfile(points[0][0], tuple(solved), tuple(p for part in points for p in part[1:]), final, entering=entering)
