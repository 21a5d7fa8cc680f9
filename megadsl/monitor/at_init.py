"""What a plan's model really does at initialisation: its moments on real text, averaged over draws of the weights.

Shape letters: b micro-batch, s sequence.
"""

import torch

from megadsl.config import Config
from megadsl.data.sampler import MicroBatches
from megadsl.model.init import initialize
from megadsl.model.precision import prepare_precision
from megadsl.model.stack import SequentialModel
from megadsl.monitor.probes import SignalProbes
from megadsl.monitor.signal import points_of
from megadsl.parallel.device import prepare_device
from megadsl.parallel.groups import initialize_groups
from megadsl.parallel.launch import Launch
from megadsl.parallel.rng import seed_micro_batch
from megadsl.parallel.topology import Topology
from megadsl.schemes.plan import SignalPlan, StreamPrediction
from megadsl.tasks.registry import task_of

SAMPLES = 16


def measure_at_init(config: Config, plan: SignalPlan, num_seeds: int) -> list[StreamPrediction]:
    """Measured moments after the embedding and after every sublayer, in the units of the plan's predictions.

    The same 16 samples of the training data for every draw; seeds count up from training.seed. Needs a dataset.
    """
    task = task_of(config)
    task.check()
    device = prepare_device(config.training.device)
    if not torch.distributed.is_initialized():
        initialize_groups(Launch.alone(), Topology(1, 1, 1), device)
    definition = task.define_model(plan)
    network = SequentialModel(definition.entries)
    prepare_precision(network, config.training.precision)
    network.to(device).train()
    probes = SignalProbes(network.calls(), points_of(plan), definition.embedding, device, sequences=None)
    reader = MicroBatches(
        task.splits(SAMPLES).train, consumed_samples=0, micro_batch_size=SAMPLES, global_batch_size=SAMPLES, num_samples=SAMPLES,
        collate=task.collate,
    )
    batch = next(reader)
    counts = task.counts(batch)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with probes.watching(task.real_positions(batch)):
        for seed in range(config.training.seed, config.training.seed + num_seeds):
            initialize(network.canonical_parameters(), seed, 0, 1)
            seed_micro_batch(seed, 0, 0)  # dropout
            sums = task.loss(network(definition.inputs_of(batch)), batch)
            sum(total / max(1.0, count) for total, count in zip(sums, counts, strict=True)).backward()
            network.zero_grad()
    values = probes.read(0).values
    columns = ("forward_second_moment", "token_correlation", "gradient_variance", "gradient_correlation")
    # All but the last point, which is the head's input.
    return [StreamPrediction(*row) for row in zip(*(values[name][:-1].tolist() for name in columns), strict=True)]
