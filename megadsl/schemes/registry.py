"""Schemes by name. A new one is a file with `parametrize(model, scheme, vocab_size) -> Parametrization` and a line here."""

import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.errors import UserError
from megadsl.schemes import completep, deepnorm, dslm, dslm_paper, keel, layernorm_scaling, layerscale, rezero, vanilla, xavier
from megadsl.schemes.assemble import Parametrization, assemble
from megadsl.schemes.plan import SignalPlan
from megadsl.theory.inputs import TokenStatistics, zipf


@dataclass(frozen=True)
class Scheme:
    """A scheme and the model.norm_position that it goes with (None: either)."""

    parametrize: Callable[[ModelConfig, SchemeConfig, int], Parametrization]
    norm_position: str | None = None

    @property
    def description(self) -> tuple[str, str]:
        """(what it is and where it is from, formula): the first two paragraphs of its file's docstring."""
        what, formula, *_ = sys.modules[self.parametrize.__module__].__doc__.split("\n\n")
        return " ".join(what.partition(": ")[2].split()), " ".join(formula.split())


SCHEMES = {
    "dslm": Scheme(dslm.parametrize),
    "dslm_paper": Scheme(dslm_paper.parametrize),
    "vanilla": Scheme(vanilla.parametrize),
    "xavier": Scheme(xavier.parametrize),
    "deepnorm": Scheme(deepnorm.parametrize, "post"),
    "keel": Scheme(keel.parametrize, "post"),
    "layernorm_scaling": Scheme(layernorm_scaling.parametrize, "pre"),
    "completep": Scheme(completep.completep, "pre"),
    "depth_mup": Scheme(completep.depth_mup, "pre"),
    "layerscale": Scheme(layerscale.parametrize, "pre"),
    "rezero": Scheme(rezero.parametrize, "pre"),
}


def build_plan(model: ModelConfig, scheme: SchemeConfig, statistics: TokenStatistics | None, vocab_size: int) -> SignalPlan:
    """The plan of `scheme` for `model`; without token statistics a Zipf distribution over the vocabulary is assumed.

    The matrix recursion is used at every length: its position grid keeps the cost independent of it (1000 layers in about a
    second).

    Raises:
        UserError: no such scheme, or one that does not go with the model.
    """
    return assemble(build_parametrization(model, scheme, vocab_size), model, statistics or zipf(vocab_size), vocab_size)


def build_parametrization(model: ModelConfig, scheme: SchemeConfig, vocab_size: int) -> Parametrization:
    """What the scheme decides, before the theory fills in the open stds; UserError as in `build_plan`."""
    found = scheme_of(scheme.name)
    if found.norm_position not in (None, model.norm_position):
        raise UserError(f"scheme {scheme.name} goes with model.norm_position={found.norm_position}, not {model.norm_position}.")
    return found.parametrize(model, scheme, vocab_size)


def scheme_of(name: str) -> Scheme:
    """The scheme of that name; UserError if there is none."""
    if name not in SCHEMES:
        near = difflib.get_close_matches(name, SCHEMES, n=1, cutoff=0.0)[0]
        raise UserError(f"There is no scheme '{name}'; did you mean {near}? (known: {', '.join(SCHEMES)})")
    return SCHEMES[name]
