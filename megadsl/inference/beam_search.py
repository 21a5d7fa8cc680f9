"""Beam search over a batch of sources at once, with a key/value cache.

A hypothesis of n tokens (the end counts as one) scores (sum of its log-probabilities) / n^a, a the length penalty: 1 is the mean per
token, 0 the plain sum, which favours short ones (fairseq's --lenpen). Shape letters: b sources, k beams, v vocabulary.
"""

from typing import Protocol

import torch

from megadsl.model.cache import KeyValueCache

Hypothesis = tuple[float, list[int]]  # (score, token ids without start and end)


class Decoder(Protocol):
    """What is searched: k rows for each of the b sources, behind each other."""

    device: torch.device
    rows: int
    cache: KeyValueCache

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [b k, 1] -> logits [b k, v]."""


class _Search:
    """The beams of one source."""

    def __init__(self, num_beams: int, length_penalty: float, steps: int, early_stopping: bool):
        self._num_beams, self._penalty, self._steps, self._early = num_beams, length_penalty, steps, early_stopping
        self.rows: list[list[int]] = [[] for _ in range(num_beams)]
        self.finished: list[Hypothesis] = []
        self.done = False

    def advance(self, step: int, best: list[float], candidates: list[tuple[int, int]], end: int) -> list[tuple[float, int, int]]:
        """Take the 2k best (score, (beam, token)) of step `step`; the (score, beam, token) of the k beams that go on."""
        kept = []
        for score, (beam, token) in zip(best, candidates, strict=True):
            if token == end:
                self.finished.append((score / step ** self._penalty, self.rows[beam]))
            elif len(kept) < self._num_beams:
                kept.append((score, beam, token))
        self.finished = sorted(self.finished, key=lambda pair: -pair[0])[:self._num_beams]
        # A beam can only lose probability; its mean may still rise, so the bound is its score over the longest length.
        bound = kept[0][0] / self._steps ** self._penalty
        self.done = len(self.finished) == self._num_beams and (self._early or self.finished[-1][0] >= bound)
        if not self.done:
            self.rows = [[*self.rows[beam], token] for _, beam, token in kept]
        return kept

    def result(self, scores: list[float]) -> list[Hypothesis]:
        """The best hypotheses, best first; of a search that ran out of steps also those that have no end."""
        found = self.finished
        if not self.done:
            found = found + [(score / self._steps ** self._penalty, row) for score, row in zip(scores, self.rows, strict=True)]
        return sorted(found, key=lambda pair: -pair[0])[:self._num_beams]


@torch.inference_mode()
def beam_search(decoding: Decoder, start: int, end: int, vocab_size: int, steps: int, num_beams: int,
                length_penalty: float = 1.0, early_stopping: bool = False) -> list[list[Hypothesis]]:
    """For every source the likeliest targets found, best first, of at most `steps` tokens.

    `early_stopping`: a source is done with its first k finished hypotheses, as in fairseq, and not only once no beam can get better.
    """
    device, rows = decoding.device, decoding.rows
    searches = [_Search(num_beams, length_penalty, steps, early_stopping) for _ in range(rows // num_beams)]
    tokens = torch.full((rows, 1), start, device=device)
    # All beams start equal: only the first may branch.
    scores = torch.full((len(searches), num_beams), -torch.inf, device=device)
    scores[:, 0] = 0.0
    for step in range(1, steps + 1):
        log_probability = decoding.next_logits(tokens)[:, :vocab_size].float().log_softmax(dim=-1)
        total = (scores[..., None] + log_probability.unflatten(0, (-1, num_beams))).flatten(1)
        best, flat = total.topk(min(2 * num_beams, total.size(1)), dim=1)
        best, flat = best.tolist(), flat.tolist()
        kept = []
        for number, search in enumerate(searches):
            if search.done:  # its rows run on, unread
                kept.append([(0.0, beam, end) for beam in range(num_beams)])
            else:
                kept.append(search.advance(step, best[number], [divmod(index, vocab_size) for index in flat[number]], end))
        if step == steps or all(search.done for search in searches):
            scores = torch.tensor([[score for score, _, _ in one] for one in kept])
            break
        scores = torch.tensor([[score for score, _, _ in one] for one in kept], device=device)
        order = [number * num_beams + beam for number, one in enumerate(kept) for _, beam, _ in one]
        if order != list(range(rows)):
            decoding.cache.swap_key_value_dict(torch.tensor(order, device=device))
        tokens = torch.tensor([[token] for one in kept for _, _, token in one], device=device)
    return [search.result(row) for search, row in zip(searches, scores.tolist(), strict=True)]
