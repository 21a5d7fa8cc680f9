"""Text from a decoder, token by token with Megatron-core's key/value cache: greedy, temperature, top-k and top-p.

Shape letters: b samples, s sequence, v vocabulary.
"""

from collections.abc import Callable

import torch

from megadsl.errors import UserError
from megadsl.inference.load import TrainedModel
from megadsl.inference.sampling import Sampling
from megadsl.model.activations import Activations
from megadsl.model.cache import KeyValueCache
from megadsl.model.embedding import EmbeddingSum, RelativePositions
from megadsl.model.layer import Layer
from megadsl.model.stack import LayerEntry


@torch.inference_mode()
def generate(model: TrainedModel, prompt: str, max_new_tokens: int, sampling: Sampling, num_samples: int = 1) -> list[str]:
    """Continuations of `prompt`, each ended by end-of-document, max_new_tokens or the model's seq_length.

    An empty prompt starts a new document.

    Raises:
        UserError: the prompt leaves no room within model.seq_length, or a number is out of range.
    """
    if max_new_tokens < 1 or num_samples < 1:
        raise UserError("--max-new-tokens and --num-samples must be at least 1.")
    eod, seq_length = model.tokenizer.eod, model.config.model.seq_length
    ids = model.tokenizer.encode(prompt) or [eod]
    if len(ids) >= seq_length:
        raise UserError(
            f"The prompt has {len(ids)} tokens, but the model reads {seq_length} (model.seq_length); shorten the prompt."
        )
    cache = KeyValueCache(num_samples, seq_length)
    tokens = torch.tensor([ids] * num_samples, device=model.device)
    rows = sample(lambda new: next_token_logits(model, new, cache), tokens, min(max_new_tokens, seq_length - len(ids)),
                  sampling, eod, model.tokenizer.vocab_size)
    return [model.tokenizer.decode(row) for row in rows]


def sample(next_logits, tokens: torch.Tensor, steps: int, sampling: Sampling, end: int, vocab_size: int) -> list[list[int]]:
    """Draw up to `steps` tokens after `tokens` [b, s]; a row ends before `end`.

    Args:
        next_logits: new tokens [b, s] -> logits [b, v] after them.
    """
    generator = torch.Generator(tokens.device).manual_seed(sampling.seed)
    chosen, finished = [], torch.zeros(tokens.size(0), dtype=torch.bool, device=tokens.device)
    for _ in range(steps):
        next_tokens = sampling.choose(next_logits(tokens)[:, :vocab_size], generator).masked_fill(finished, end)
        finished |= next_tokens == end
        chosen.append(next_tokens)
        if bool(finished.all()):
            break
        tokens = next_tokens.unsqueeze(1)
    return [row[:row.index(end)] if end in row else row for row in torch.stack(chosen, dim=1).tolist()]


def next_token_logits(model: TrainedModel, tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    """Logits [b, v] after `tokens` [b, s], which follow what `cache` holds; they are cached too."""
    return run_cached(model.network.calls(), Activations(tokens=tokens), cache, tokens.size(1))


def run_cached(calls: list[tuple[LayerEntry, Callable]], value: Activations, cache: KeyValueCache, length: int) -> torch.Tensor:
    """Logits [b, v] after the last of the `length` tokens that `value` brings; their keys and values are cached."""
    offset = cache.length
    if offset and length > 1:
        raise ValueError("after the prompt, tokens are fed one at a time")
    for entry, call in calls:
        if isinstance(call, Layer):
            value = call(value, inference_context=cache)
        elif isinstance(call, (EmbeddingSum, RelativePositions)):
            value = call(value, offset)
        else:
            value = call(value)
        if entry.name == "final_norm":
            value = value.replace(hidden=value.hidden[-1:])  # only the last position is asked for
    cache.advance(length)
    return value["logits"][0]
