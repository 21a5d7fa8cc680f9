"""What every task over text has: the tokenizer of its configuration, which its checkpoints keep, and a vocabulary padded to a multiple."""

from functools import cached_property

from megadsl.data.dataset import TOKENIZER
from megadsl.data.tokenizer import Tokenizer
from megadsl.tasks.task import Task


class TokenizedTask(Task):
    """A task whose model reads or writes pieces of tokenizer.model."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.config.tokenizer.model)

    @property
    def padded_output_size(self) -> int:
        return self.config.tokenizer.padded_vocab_size(self.tokenizer.vocab_size)

    def files(self) -> dict[str, bytes]:
        return {TOKENIZER: self.tokenizer.content}
