"""How the next token is chosen. Shape letters: b samples, v vocabulary."""

import math
from dataclasses import dataclass

import torch

from megadsl.errors import UserError

# Below this temperature logits would overflow fp32, and sampling is greedy anyway.
GREEDY = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature} is not a number from 0 up; 0 is greedy, 1 is the model's own distribution.")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k} is negative; 0 keeps every token.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} is not in (0, 1]; 1 keeps every token.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed} is not in [0, 2^63).")

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """logits [b, v] -> token ids [b]."""
        if self.temperature < GREEDY:
            return logits.argmax(dim=-1)
        logits = logits.float() / self.temperature
        if self.top_k:
            smallest = logits.topk(min(self.top_k, logits.size(-1))).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probability = ordered.softmax(dim=-1)
            # A token stays if the ones before it hold less than top_p; so the first one always stays.
            dropped = probability.cumsum(dim=-1) - probability >= self.top_p
            logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)
