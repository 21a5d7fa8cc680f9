"""The plan of a run's configuration: vocabulary and token statistics are read from the run's files where they exist, else
assumed.

The vocabulary only matters to Zipf and to the gradient at the head, so a plan can be printed before there is a tokenizer.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from megadsl.config import Config
from megadsl.errors import UserError
from megadsl.schemes.assemble import profile_of
from megadsl.schemes.plan import SignalPlan
from megadsl.schemes.registry import build_parametrization, build_plan, scheme_of
from megadsl.theory.inputs import TokenStatistics, mixed, zipf
from megadsl.theory.profile import DepthProfile

DEFAULT_VOCAB_SIZE = 32000


def plan_for_run(config: Config) -> SignalPlan:
    """The SignalPlan that training this configuration would use."""
    statistics = run_statistics(config)
    return build_plan(config.model, config.scheme, statistics, statistics.vocab_size)


def plan_for_comparison(config: Config, scheme: str) -> SignalPlan:
    """The SignalPlan of another scheme for a configuration, whose norms it moves where it needs to."""
    norm_position = scheme_of(scheme).norm_position or config.model.norm_position
    model = config.model.model_copy(update={"norm_position": norm_position})
    chosen = config.scheme.model_copy(update={"name": scheme})
    return plan_for_run(config.model_copy(update={"model": model, "scheme": chosen}))


def profile_for_run(config: Config, level: Literal["matrix", "scalar"]) -> DepthProfile:
    """The theory's DepthProfile of a configuration."""
    statistics = run_statistics(config)
    parametrization = build_parametrization(config.model, config.scheme, statistics.vocab_size)
    return profile_of(parametrization, config.model, statistics, statistics.vocab_size, level)


def run_statistics(config: Config) -> TokenStatistics:
    """Statistics of the datasets in their proportions (a Zipf distribution over the vocabulary where a dataset has none yet), and
    what the objective does to them."""
    found = [(Path(dataset.path) / "stats.json", dataset.weight) for dataset in config.data.datasets]
    if found and all(path.is_file() for path, _ in found):
        statistics = mixed([(TokenStatistics.load(path), weight) for path, weight in found])
    else:
        statistics = zipf(_vocab_size(Path(config.tokenizer.model)))
    encoder = config.model.family == "encoder"
    return replace(
        statistics, masking_probability=config.data.masking_probability if encoder else None,
        # Two parts have the two token types, cut anywhere in the middle half of the text; without them all positions have the
        # first. E[c^2 + (1 - c)^2] = 13/24 for c uniform in [1/4, 3/4].
        same_type_probability=13.0 / 24.0 if encoder and config.data.sentence_order else 1.0,
    )


def describe_inputs(config: Config) -> str:
    """One line that says where the token statistics come from."""
    statistics = run_statistics(config)
    source = f"{statistics.num_tokens:,} tokens of {len(config.data.datasets)} dataset(s)" if statistics.num_tokens else "Zipf"
    return f"vocabulary {statistics.vocab_size}, repeat probability {statistics.repeats:.4f} ({source})"


def _vocab_size(path: Path) -> int:
    if not path.is_file():
        return DEFAULT_VOCAB_SIZE
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is not a SentencePiece model; set tokenizer.model to one.") from error
