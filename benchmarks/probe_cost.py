"""What measuring the signal costs: time of a measured training step over that of a step without, paired in one process.

    python benchmarks/probe_cost.py [--rounds 12]

Steps with and without probes alternate (in random order), at ZeRO 1 on one rank and one thread, in CPU time; printed are the medians of the ratio
of a pair and what that means at the default of monitor.signal_interval. Sizes: 192 layers x 64 and 24 x 512, 1,024 tokens a step.
"""

import argparse
import random
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

SIZES = ((192, 64), (24, 512))


def make_data(folder: Path) -> dict:
    """The data and tokenizer sections of a small real dataset."""
    from megadsl.data.corpus import build_corpus
    from megadsl.data.preprocess import preprocess
    from megadsl.data.tokenizer_training import train_tokenizer

    library = Path(sysconfig.get_paths()["stdlib"])
    build_corpus([str(library / name) for name in ("asyncio", "email", "json")], folder / "corpus", max_document_chars=4000)
    train_tokenizer(folder / "corpus", folder / "tokenizer.model", vocab_size=2048, model_type="bpe")
    preprocess(folder / "corpus", folder / "tokenizer.model", folder / "dataset", workers=1)
    return {"tokenizer": {"model": str(folder / "tokenizer.model")}, "data": {"datasets": [str(folder / "dataset")], "num_workers": 0}}


def ratios(layers: int, hidden: int, sections: dict, rounds: int) -> list[float]:
    """CPU time of a measured step over that of its neighbour, one a round."""
    from megadsl.config.load import parse_config
    from megadsl.data.sampler import MicroBatches
    from megadsl.parallel.device import prepare_device
    from megadsl.parallel.groups import destroy_groups, initialize_groups
    from megadsl.parallel.launch import Launch
    from megadsl.parallel.topology import Topology
    from megadsl.tasks.planning import plan_for_run
    from megadsl.tasks.registry import task_of
    from megadsl.training.engine import Engine

    config = parse_config({
        "model": {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": max(4, hidden // 64), "seq_length": 128},
        "training": {"micro_batch_size": 8, "global_batch_size": 8}, **sections,
    })
    topology, device = Topology(1, 1, 1), prepare_device("cpu")
    initialize_groups(Launch.alone(), topology, device)
    task = task_of(config)
    engine = Engine(config, task, plan_for_run(config), topology, topology.coordinate(0), device)
    batches = MicroBatches(task.splits(8 * 2 * (rounds + 2)).train, consumed_samples=0, micro_batch_size=8, global_batch_size=8)
    found, iteration, order = [], 0, random.Random(0)
    for number in range(rounds + 1):
        seconds = {}
        for measured in order.sample([False, True], 2):
            begun = time.process_time()
            engine.train_step(batches, iteration, 1e-4, measured=measured)
            if measured:
                engine.measuring.read()
            seconds[measured] = time.process_time() - begun
            iteration += 1
        if number:  # the first round warms up
            found.append(seconds[True] / seconds[False])
    destroy_groups()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    from megadsl.config.training import MonitorConfig

    interval = MonitorConfig().signal_interval
    print(f"| layers x hidden | every step | quartiles | every {interval} steps |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        sections = make_data(Path(folder))
        for layers, hidden in SIZES:
            found = ratios(layers, hidden, sections, rounds)
            low, median, high = statistics.quantiles(found, n=4)
            print(f"| {layers} x {hidden} | {median:.3f} | {low:.3f} to {high:.3f} | {1 + (median - 1) / interval:.4f} |", flush=True)


if __name__ == "__main__":
    main()
