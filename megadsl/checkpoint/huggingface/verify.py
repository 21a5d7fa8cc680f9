"""An exported folder, reloaded from disk by transformers, against our model: same logits, same token ids."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megadsl.checkpoint.export_source import ExportSource
from megadsl.errors import UserError

TOLERANCE = 1e-4
# What loading a model of a single head must not report.
ANY_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")
# With weights rounded to bf16 the logits differ by what the rounding of all layers adds up to; more than this is a mistake.
ROUNDED_TOLERANCE = 0.5
_AUTO = {"decoder": "AutoModelForCausalLM", "encoder": "AutoModelForMaskedLM", "encoder_decoder": "AutoModelForSeq2SeqLM"}
_HARD_TEXTS = (
    "", "a  b   c\t\n\n\td", "<mask> <s></s> <pad> <0x41> <extra_id_0>", "a\u2581b \u2581\u2581", "\x00\x1f\x7f", "é漢🙂 \u202e\ufffd", " " * 37,
)


@dataclass(frozen=True)
class Comparison:
    """Largest difference of a position's logits over the largest logit there, and how many positions and texts were compared.

    `rounded_error` is that of weights rounded to 16 bits, where they were; `error` that of the same weights in fp32.
    """

    error: float
    rounded_error: float | None
    positions: int
    texts: int


def compare_with_folder(source: ExportSource, architecture: str, folder: Path, exact: Callable[[], Iterable] | None,
                        has_tokenizer: bool) -> Comparison:
    """Load `folder` and compare; `exact` gives the tensors in fp32 where the folder's are rounded.

    Raises:
        UserError: other logits, other token ids, or a tensor too many or too few.
    """
    transformers = offline_transformers()
    model = load_theirs(transformers, source.config.model.family, folder)
    if type(model).__name__ != architecture:
        raise UserError(f"transformers loads {folder} as {type(model).__name__}, not {architecture}; nothing was written.")
    sample = source.sample
    ours = source.logits(sample)
    error, rounded = relative_error(their_logits(model, sample), ours), None
    if exact is not None:
        rounded = error
        _assign(model, exact())
        error = relative_error(their_logits(model, sample), ours)
    require_close(architecture, error)
    if rounded is not None:
        require_close(architecture, rounded, ROUNDED_TOLERANCE)
    texts = _compare_ids(transformers, source, folder) if has_tokenizer else 0
    return Comparison(error, rounded, ours.shape[0] * ours.shape[1], texts)


def offline_transformers():
    """The transformers package, told to keep off the network; UserError where it is not installed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError as error:
        raise UserError("This needs the package transformers (pip install 'megadsl[hf]').") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def require_close(name: str, error: float, limit: float = TOLERANCE) -> None:
    """UserError where an exported model's logits differ from ours by more than `limit`."""
    if not error <= limit:
        raise UserError(f"The exported {name} gives other logits than our model (relative error {error:.1e}); nothing was written.")


def load_theirs(transformers, family: str, folder: Path) -> torch.nn.Module:
    """The language model of a family in a folder; see `load_class`."""
    return load_class(getattr(transformers, _AUTO[family]), folder)


def load_class(theirs: type, folder: Path, wrong: tuple[str, ...] = ("missing_keys", "mismatched_keys")) -> torch.nn.Module:
    """The model in a folder in fp32, as a class (or Auto class) of transformers: safetensors only and no code of its own.

    Raises:
        UserError: it cannot be loaded, or its report of loading names tensors under one of the keys of `wrong`.
    """
    try:
        model, report = theirs.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"transformers cannot load {folder}: {str(error).splitlines()[0]}") from error
    for key in wrong:
        if report[key]:
            raise UserError(f"transformers loads {folder} with {key.replace('_', ' ')}, for example {sorted(map(str, report[key]))[0]}.")
    return model.eval()


@torch.inference_mode()
def their_logits(model: torch.nn.Module, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """Their logits for a ExportSource's sample, [b, s, v]."""
    if "tokens" in sample:
        return model(input_ids=sample["tokens"]).logits
    return model(input_ids=sample["source_tokens"], attention_mask=sample["source_segments"],
                 decoder_input_ids=sample["target_tokens"]).logits


def relative_error(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """max over positions of |theirs - ours|_max / |ours|_max."""
    return ((theirs - ours).abs().amax(-1) / ours.abs().amax(-1)).max().item()


@torch.no_grad()
def _assign(model: torch.nn.Module, tensors: Iterable) -> None:
    targets = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, tensor in tensors:
        targets[name].copy_(tensor)


def _compare_ids(transformers, source: ExportSource, folder: Path) -> int:
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    library = sorted(Path(os.__file__).parent.glob("[a-b]*.py"))
    texts = [*_HARD_TEXTS, *(path.read_text(encoding="utf-8", errors="replace")[:20_000] for path in library)]
    for text in texts:
        ours = source.tokenizer.encode(text)
        if theirs(text)["input_ids"] != ours:
            raise UserError(f"The exported tokenizer gives other ids than ours for a text that begins {text[:40]!r}; nothing was written.")
    return len(texts)
