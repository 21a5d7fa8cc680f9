"""Signal theory of transformers at initialisation: moments of components and of whole models, forward and backward. No torch.

    from megadsl import theory
    theory.component("attention", mask="causal", length=512, correlation=0.2).second_moment
    theory.propagate(shape, embedding, sublayers, vocab_size=32000, level="matrix")          # -> DepthProfile
docs/theory.md says what each formula is, where it holds, and how it was checked.
"""

from megadsl.theory.attention import AttentionShape, AttentionSignal
from megadsl.theory.components import Moments, Signal
from megadsl.theory.contract import NAMES, component
from megadsl.theory.inputs import TokenStatistics, cross_entropy_gradient, embedding_moments, zipf
from megadsl.theory.profile import DepthProfile, Prediction, propagate
from megadsl.theory.shape import Embedding, Head, ModelShape, Sublayer

__all__ = [
    "NAMES", "AttentionShape", "AttentionSignal", "DepthProfile", "Embedding", "Head", "ModelShape", "Moments", "Prediction",
    "Signal", "Sublayer", "TokenStatistics", "component", "cross_entropy_gradient", "embedding_moments", "propagate", "zipf",
]
