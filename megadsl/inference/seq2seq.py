"""Targets of an encoder-decoder: greedy, sampled, or by beam search.

The source is encoded once; the decoder then runs with a key/value cache. A source text may hold the tokenizer's own marks
<extra_id_0>, <extra_id_1>, ... (span corruption) or <mask> (infilling) where the model shall fill in.
Shape letters: b beams or samples, s source length, v vocabulary.
"""

import re

import torch

from megadsl.data.tokenizer import MASK_PIECE, SENTINEL_PIECE, Tokenizer
from megadsl.errors import UserError
from megadsl.inference.beam_search import beam_search
from megadsl.inference.generate import run_cached, sample
from megadsl.inference.load import TrainedModel
from megadsl.inference.sampling import Sampling
from megadsl.model.activations import Activations
from megadsl.model.builder import TARGET_WORDS
from megadsl.model.cache import KeyValueCache
from megadsl.model.loss import whole_logits


class Decoding:
    """Encoded sources, and the logits of what may follow them.

    Args:
        sources: what the encoder reads of a batch, by name, on the model's device.
        copies: rows of the decoder for every source, behind each other.
    """

    def __init__(self, model: TrainedModel, sources: dict[str, torch.Tensor], copies: int):
        calls = model.network.calls()
        start = next(index for index, (entry, _) in enumerate(calls) if entry.name == TARGET_WORDS)
        self._decoder, self.device = calls[start:], model.device
        value = Activations(sources)
        for _, call in calls[:start]:
            value = call(value)
        # The batch is the second dimension of the hidden state and the first of all context.
        self._encoded = Activations((name, tensor.repeat_interleave(copies, dim=1 if name == "hidden" else 0)) for name, tensor in value.items())
        self.rows = self._encoded.hidden.size(1)
        self.cache = KeyValueCache(self.rows, model.config.model.target_length)

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [b, 1] -> logits [b, v]."""
        return whole_logits(run_cached(self._decoder, self._encoded.replace(target_tokens=tokens), self.cache, tokens.size(1)))


def decoding_of_tokens(model: TrainedModel, source: list[int], copies: int) -> Decoding:
    """One source of token ids, unpadded."""
    sources = {"source_tokens": torch.tensor([source], device=model.device)}
    if "source_segments" in model.definition.inputs:
        sources["source_segments"] = torch.ones_like(sources["source_tokens"])
    return Decoding(model, sources, copies)


@torch.inference_mode()
def generate_target(model: TrainedModel, prompt: str, max_new_tokens: int, sampling: Sampling, num_samples: int = 1,
                    num_beams: int = 1) -> list[str]:
    """Targets for the source `prompt`, each ended by end-of-sentence, max_new_tokens or the model's decoder_seq_length.

    With num_beams > 1, the num_samples likeliest targets that beam search finds (mean log-probability per token).

    Raises:
        UserError: the source does not fit into model.seq_length, or a number is out of range.
    """
    if max_new_tokens < 1 or num_samples < 1 or num_beams < 1:
        raise UserError("--max-new-tokens, --num-samples and --num-beams must be at least 1.")
    if num_beams > 1 and num_samples > num_beams:
        raise UserError(f"--num-samples {num_samples} is more than --num-beams {num_beams} can give; raise --num-beams.")
    tokenizer, shape = model.tokenizer, model.config.model
    source = [*encode_marked(tokenizer, prompt), tokenizer.eos]
    if len(source) > shape.seq_length:
        raise UserError(
            f"The source has {len(source)} tokens, but the encoder reads {shape.seq_length} (model.seq_length); shorten the prompt."
        )
    steps = min(max_new_tokens, shape.target_length)
    if num_beams > 1:
        decoding = decoding_of_tokens(model, source, num_beams)
        found = beam_search(decoding, tokenizer.bos, tokenizer.eos, tokenizer.vocab_size, steps, num_beams)[0]
        rows = [row for _, row in found[:num_samples]]
    else:
        start = torch.full((num_samples, 1), tokenizer.bos, device=model.device)
        rows = sample(decoding_of_tokens(model, source, num_samples).next_logits, start, steps, sampling, tokenizer.eos,
                      tokenizer.vocab_size)
    return [decode_marked(tokenizer, row) for row in rows]


def encode_marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text in which <mask> and <extra_id_N> stand for themselves."""
    ids: list[int] = []
    for part in re.split(rf"({MASK_PIECE}|{SENTINEL_PIECE.format('[0-9]+')})", text):
        if part == MASK_PIECE:
            ids.append(tokenizer.mask)
        elif re.fullmatch(SENTINEL_PIECE.format("[0-9]+"), part):
            sentinels, number = tokenizer.additional_special_tokens_ids, int(part[len("<extra_id_"):-1])
            if number >= len(sentinels):
                raise UserError(f"The tokenizer has {len(sentinels)} sentinels, so {part} is none; count them from 0.")
            ids.append(sentinels[number])
        else:
            ids += tokenizer.encode(part)
    return ids


def decode_marked(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of `ids` in which sentinels are written as their pieces."""
    names = {index: SENTINEL_PIECE.format(number) for number, index in enumerate(tokenizer.additional_special_tokens_ids)}
    parts, plain = [], []
    for index in ids:
        if index in names:
            parts += [tokenizer.decode(plain), names[index]]
            plain = []
        else:
            plain.append(index)
    return "".join([*parts, tokenizer.decode(plain)])
