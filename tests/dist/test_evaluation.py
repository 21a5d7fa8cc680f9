"""What `megadsl evaluate` says of models that know all there is to know: words drawn with equal chances have an entropy that no
model can beat and a trained one reaches, so each number has a right value. A model that has learnt nothing is far from it.
"""

import contextlib
import io
import json
import math
import random
from pathlib import Path

import pytest
from ranks import ForkServer

WORDS = 8
ENTROPY = math.log(WORDS)  # nats per word, each of which is one token


@pytest.fixture(scope="module")
def words(small_data, tmp_path_factory):
    """A dataset of long documents, each a row of words out of 8 that are one token each."""
    from megadsl.data.corpus import build_corpus
    from megadsl.data.preprocess import preprocess
    from megadsl.data.tokenizer import Tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("words"), Tokenizer.load(small_data.tokenizer)
    candidates = ["self", "the", "if", "not", "in", "is", "of", "and", "to", "return", "def", "for", "name", "None", "class", "as", "or",
                  "import", "from", "line", "with", "else", "raise"]
    single = [word for word in candidates if len(tokenizer.encode(f" {word} self")) == 2][:WORDS]
    assert len(single) == WORDS
    draw = random.Random(0)
    (folder / "text").mkdir()
    for index in range(20):
        (folder / "text" / f"{index}.txt").write_text(" " + " ".join(draw.choices(single, k=1500)))
    build_corpus([str(folder / "text")], folder / "corpus", max_document_chars=10**6, fractions=(0.7, 0.1, 0.2))
    preprocess(folder / "corpus", small_data.tokenizer, folder / "dataset", workers=1, seq_length=32)
    return folder / "dataset"


def evaluated(config, *options: str) -> dict:
    """Train, then what `megadsl evaluate` prints of the run on the test split."""
    from megadsl.cli.main import app
    from megadsl.training.loop import train

    train(config)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        app(["evaluate", config.training.run_dir, "--data", config.data.datasets[0].path, "--device", "cpu", "--json", *options],
            standalone_mode=False)
    return json.loads(printed.getvalue())


def validation_loss(run_dir: Path) -> float:
    """The run's own, after its last step."""
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row["validation/loss"] for row in rows if "validation/loss" in row][-1]


def run(server, small_data, words: Path, run_dir: Path, iterations: int, model: dict, *options: str) -> dict:
    config = small_data.config(
        run_dir, model={"num_layers": 2, **model}, data={"datasets": [str(words)]}, monitor={"log_interval": 100},
        optimizer={"lr": 1e-2, "lr_warmup_iters": 10, "clip_grad": 1.0},
        training={"train_iters": iterations, "micro_batch_size": 16, "global_batch_size": 16, "eval_iters": 4},
    )
    return server.run(1, evaluated, config, *options)[0]


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


def test_a_decoder_reaches_the_entropy(server, small_data, words, tmp_path):
    result = run(server, small_data, words, tmp_path / "run", 100, {})
    assert ENTROPY - 0.01 < result["loss"] < ENTROPY + 0.04
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2) * result["tokens"] / result["text_bytes"], rel=1e-4)
    assert validation_loss(tmp_path / "run") == pytest.approx(ENTROPY, abs=0.04)


def test_an_encoder_knows_what_the_masks_leave(server, small_data, words, tmp_path):
    """Of the tokens to predict 8 in 10 are masked, one is another token (it tells nothing) and one stands there unchanged."""
    result = run(server, small_data, words, tmp_path / "run", 200, {"family": "encoder"}, "--pseudo-tokens", "300")
    count = result["masked_tokens"]
    accuracy = 0.1 + 0.9 / WORDS
    assert count > 1000 and result["masked_accuracy"] == pytest.approx(accuracy, abs=4 * (accuracy * (1 - accuracy) / count) ** 0.5)
    error = 4 * ENTROPY * (0.1 * 0.9 / count) ** 0.5  # of the share that is unchanged
    assert 0.9 * ENTROPY - error < result["masked_loss"] < 0.9 * ENTROPY + error + 0.1
    assert result["pseudo_perplexity_tokens"] == 300 and math.log(result["pseudo_perplexity"]) == pytest.approx(ENTROPY, abs=0.05)


def test_an_encoder_decoder_knows_what_the_spans_leave(server, small_data, words, tmp_path):
    """A window of 32 has 5 words in 2 spans (4 ways of sharing them out, all as likely), and a target of these, 2 sentinels and an end."""
    result = run(server, small_data, words, tmp_path / "run", 200, {"family": "encoder_decoder", "decoder_seq_length": 12})
    entropy = (5 * ENTROPY + math.log(4)) / 8
    assert result["tokens"] == 4 * result["spans"] > 2000
    assert entropy - 0.02 < result["loss"] < entropy + 0.06
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    exact = sum(WORDS ** -length for length in range(1, 5)) / 4
    assert result["exact_span_accuracy"] == pytest.approx(exact, abs=4 * (exact * (1 - exact) / result["spans"]) ** 0.5)
    assert validation_loss(tmp_path / "run") == pytest.approx(entropy, abs=0.06)
