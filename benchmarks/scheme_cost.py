"""What a scheme costs over Megatron-core's plain residual: step time of dslm / vanilla, paired in one run.

Both models take turns step by step (forward, backward, fused AdamW) on the same batch, so whatever else the machine does
hits both; the figure is the median of the paired ratios with its 95 % interval (from the order statistics).

    python benchmarks/scheme_cost.py [--shape 24x512] [--shape 192x64] [--pairs 30] [--threads 2]
"""

import argparse
import time

import numpy as np
import torch

from megadsl.config.load import parse_config
from megadsl.parallel.device import prepare_device

VOCAB_SIZE = 512


def build(scheme: str, layers: int, hidden: int, seq_length: int):
    from megadsl.model.init import initialize
    from megadsl.model.stack import SequentialModel
    from megadsl.tasks.planning import plan_for_run
    from megadsl.tasks.registry import task_of
    from megadsl.training.optimizer import parameter_groups

    model = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 16, "seq_length": seq_length}
    config = parse_config({"model": model, "scheme": scheme})
    task = task_of(config)
    stack = SequentialModel(task.define_model(plan_for_run(config), VOCAB_SIZE).entries)
    initialize(stack.canonical_parameters(), 1, 0, 1)
    groups = parameter_groups(stack.canonical_parameters(), config.optimizer, {})
    return task, stack.train(), torch.optim.AdamW(groups, lr=1e-4, fused=True)


def step(task, stack, optimizer, batch) -> float:
    begun = time.perf_counter()
    [total] = task.loss(stack({"tokens": batch["tokens"]}), batch)
    (total / batch["labels"].numel()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - begun


def compare(layers: int, hidden: int, seq_length: int, batch: int, pairs: int) -> str:
    models = {scheme: build(scheme, layers, hidden, seq_length) for scheme in ("dslm", "vanilla")}
    tokens = torch.randint(0, VOCAB_SIZE, (batch, seq_length + 1), generator=torch.Generator().manual_seed(0))
    data = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "loss_mask": torch.ones(batch, seq_length)}
    seconds = {scheme: [] for scheme in models}
    for pair in range(pairs + 2):
        # The order alternates, so that neither profits from the other's warm caches.
        for scheme in sorted(models, reverse=pair % 2 == 0):
            taken = step(*models[scheme], data)
            if pair >= 2:
                seconds[scheme].append(taken)
    ratios = np.sort(np.array(seconds["dslm"]) / np.array(seconds["vanilla"]))
    low, high = (ratios[int(np.clip(pairs / 2 + sign * 0.98 * pairs**0.5, 0, pairs - 1))] for sign in (-1, 1))
    return (
        f"{layers} layers x {hidden}: dslm / vanilla step time {np.median(ratios):.3f} (95 % interval {low:.3f} to {high:.3f}, "
        f"{pairs} pairs); vanilla {np.median(seconds['vanilla']):.3f} s a step of {batch} x {seq_length} tokens"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="LAYERSxHIDDEN, can be repeated")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = prepare_device("cpu")
    from megadsl.parallel.groups import initialize_groups
    from megadsl.parallel.launch import Launch
    from megadsl.parallel.topology import Topology

    initialize_groups(Launch.alone(), Topology(1, 1, 1), device)
    for shape in options.shape or ("24x512", "192x64"):
        layers, hidden = map(int, shape.split("x"))
        print(compare(layers, hidden, options.seq_length, options.batch, options.pairs), flush=True)


if __name__ == "__main__":
    main()
