"""What `megadsl theory check` and `megadsl theory figures` run on: models built by the schemes, and the figures of
docs/theory.md.

Both need schemes and theory together, and the theory may not know the schemes.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.schemes.assemble import embedding_of, model_shape, profile_of
from megadsl.schemes.registry import SCHEMES, build_parametrization
from megadsl.theory.check import ModelCase, check_components, check_models
from megadsl.theory.inputs import zipf

VOCABULARY = 4096
WIDTH, HEADS = 128, 4


def model_case(scheme: str, model: ModelConfig, draws: int, k: float = 2.0, level: str = "matrix", label: str = "") -> ModelCase:
    """A scheme on a model with Zipf tokens, predicted and ready to be sampled."""
    statistics = zipf(VOCABULARY)
    parametrization = build_parametrization(model, SchemeConfig(name=scheme, k=k), VOCABULARY)
    profile = profile_of(parametrization, model, statistics, VOCABULARY, level)
    name = label or f"{scheme} {model.num_layers} {model.norm_position} {model.family} p={model.hidden_dropout}"
    return ModelCase(name, model_shape(model, parametrization.norm_position), embedding_of(parametrization, model, statistics), profile, VOCABULARY,
                     draws)


def check_cases(size: str) -> Iterator[ModelCase]:
    """DSLM and vanilla at several depths, bidirectional and causal, with and without dropout; Post-LN DSLM."""
    layers, draws, length = ((12, 48), 6, 64) if size == "small" else ((12, 48, 192), 24, 128)
    shape = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "seq_length": length}
    for count in layers:
        for family in ("decoder", "encoder"):
            for p in (0.0, 0.1):
                model = ModelConfig(num_layers=count, family=family, hidden_dropout=p, **shape)
                for scheme in ("dslm", "vanilla"):
                    yield model_case(scheme, model, draws)
                if p:
                    yield model_case("dslm", model.model_copy(update={"norm_position": "post"}), draws)


def unit_cases(size: str) -> Iterator[ModelCase]:
    """The claim of unit variance where it is hardest, narrow and causal; dslm_paper beside it."""
    for scheme, layers, draws in (("dslm", 192, 16), ("dslm", 1000, 24), ("dslm_paper", 192, 16)):
        if size == "full" or layers == 192:
            yield replace(model_case(scheme, _causal(layers), draws), sequences=1)


def run_check(what: str, size: str, seed: int, note: Callable) -> list[dict]:
    """Rows of theory.check for components, models, both (all), or the unit variance of narrow causal DSLM (unit)."""
    rows = []
    if what in ("components", "all"):
        rows += check_components(6, 60, seed, largest=300, note=note) if size == "small" else \
            check_components(30, 80, seed, note=note)
    if what in ("models", "all"):
        rows += check_models(list(check_cases(size)), seed, note)
    if what == "unit":
        rows += check_models(list(unit_cases(size)), seed, note)
    return rows


def draw_figures(folder: Path, seed: int) -> Iterator[Path]:
    """The figures of docs/theory.md, one after the other."""
    yield _schemes(folder / "theory-schemes.png", seed)
    yield _rivals(folder / "theory-rivals.png")
    yield _paper_or_ours(folder / "theory-dslm-paper.png", seed)
    yield _pre_norm_growth(folder / "theory-paper-figures.png", seed)
    yield _scores(folder / "theory-attention-scores.png")
    yield _phases(folder / "theory-phases.png")


def _causal(layers: int, **changes) -> ModelConfig:
    return ModelConfig(num_layers=layers, **{"hidden_size": 64, "num_attention_heads": 4, "seq_length": 128, **changes})


def _measured(case: ModelCase, seed: int) -> list:
    from megadsl.theory.monte_carlo import sample_model

    r_g = case.profile.entering[1]
    return sample_model(case.shape, case.embedding, case.profile.sublayers, case.vocab_size, r_g, case.draws, seed,
        case.sequences).points


def _points(case: ModelCase) -> list:
    return [case.profile.embedding, *case.profile.predictions]


def _schemes(path: Path, seed: int) -> Path:
    from megadsl.theory.figures import depth_figure

    cases = {name: model_case(name, _causal(48), 12) for name in ("dslm", "vanilla", "xavier", "dslm_paper")}
    depth_figure({name: _points(case) for name, case in cases.items()}, path,
                 {name: _measured(case, seed) for name, case in cases.items()},
                 "Causal Pre-LN decoder, 48 layers, width 64, 128 tokens: predicted (lines) and sampled (points)")
    return path


def _rivals(path: Path) -> Path:
    from megadsl.theory.figures import depth_figure

    curves = {}
    for name in ("dslm", "xavier", "layernorm_scaling", "completep", "depth_mup", "deepnorm", "keel", "rezero"):
        position = SCHEMES[name].norm_position
        case = model_case(name, _causal(48, norm_position=position or "pre", hidden_size=512, num_attention_heads=8), 0)
        own = case.shape.norm_position
        curves[name if own == "pre" else f"{name} ({own})"] = _points(case)
    depth_figure(curves, path, title="Causal decoder, 48 layers, width 512, 128 tokens: predicted")
    return path


def _paper_or_ours(path: Path, seed: int) -> Path:
    from megadsl.theory.figures import depth_figure

    cases = {name: model_case(name, _causal(192), 16) for name in ("dslm", "dslm_paper")}
    depth_figure({name: _points(case) for name, case in cases.items()}, path,
                 {name: _measured(case, seed) for name, case in cases.items()},
                 "192 causal layers: true branch moments (dslm) and the released r-rule (dslm_paper)", linear=True)
    return path


def _pre_norm_growth(path: Path, seed: int) -> Path:
    """The paper's three: Xavier Pre-LN forward growth and gradient decay, Xavier Post-LN exponential gradient; encoders, p =
    0.1."""
    from megadsl.theory.figures import three_panels

    shape = {"family": "encoder", "hidden_dropout": 0.1, "attention_dropout": 0.1, "hidden_size": 128, "activation": "relu"}
    pre = model_case("xavier", _causal(48, **shape), 10)
    post = model_case("xavier", _causal(48, norm_position="post", **shape), 10)
    curves = []
    for case, attribute in ((pre, "forward_variance"), (pre, "gradient_variance"), (post, "gradient_variance")):
        curves.append(([getattr(point, attribute) for point in _points(case)],
                       [getattr(point, attribute) for point in _measured(case, seed)]))
    three_panels(path, curves, ("Pre-LN: forward variance grows linearly", "Pre-LN: gradient variance falls as 1/depth",
                                "Post-LN: gradient variance is exponential in depth"),
                 "Xavier, bidirectional, ReLU, 48 layers, width 128, dropout 0.1: predicted (lines), sampled (points)")
    return path


def _scores(path: Path) -> Path:
    """Growth of query and key weights by a common factor, all else as initialised by DSLM: what training may do to scores."""
    from megadsl.theory.figures import line_figure
    from megadsl.theory.profile import propagate

    model, statistics = _causal(24), zipf(VOCABULARY)
    base = model_case("dslm", model, 1)
    growth = np.geomspace(0.25, 16.0, 19)
    ends = []
    for kappa in growth:
        sublayers = [
            sublayer if sublayer.kind == "ffn" else _with_scores(sublayer, float(kappa)) for sublayer in base.profile.sublayers
        ]
        profile = propagate(base.shape, base.embedding, sublayers, VOCABULARY, "matrix")
        ends.append((profile.predictions[-1].forward_variance, profile.predictions[-1].correlation,
            profile.embedding.gradient_variance))
    line_figure(path, growth, np.array(ends).T, ("forward variance at the top", "token correlation at the top",
                                                 "gradient variance at the bottom"),
                "variance of the attention scores at r = 0 (kappa)", "DSLM, 24 causal layers, query and key weights grown")
    return path


def _with_scores(sublayer, kappa: float):
    weights = dict(sublayer.weight_std)
    factor = kappa ** 0.25
    return replace(sublayer, weight_std={**weights, "query": weights["query"] * factor, "key": weights["key"] * factor})


def _phases(path: Path) -> Path:
    from megadsl.theory.figures import phase_figure

    dropouts, weights = np.linspace(0.0, 0.5, 21), np.geomspace(0.25, 16.0, 25)
    grid = np.array([[
        model_case("dslm", _causal(48, family=family, hidden_dropout=float(p)), 1, k=float(k),
            level="scalar").profile.final.correlation
        for k in weights] for family in ("encoder", "decoder") for p in dropouts]).reshape(2, len(dropouts), len(weights))
    phase_figure(path, dropouts, weights, {"bidirectional": grid[0], "causal": grid[1]})
    return path
