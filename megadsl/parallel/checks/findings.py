"""What a check gives, and the processes that check together."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megadsl.parallel.device import communication_backend
from megadsl.parallel.launch import Launch

_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True, order=True)
class Finding:
    """One line of the report. `problem`: what is wrong and the way out; "" where nothing is."""

    topic: str
    text: str
    problem: str = ""


def node_name() -> str:
    """SLURM's name of this node, which is not always the machine's own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class Ranks:
    """The processes that check together; also a single one."""

    def __init__(self, launch: Launch, device: torch.device):
        self.rank, self.size, self.device = launch.rank, launch.world_size, device
        self.backend = communication_backend(device)
        if self.size > 1:
            launch.export()
            dist.init_process_group(self.backend, rank=self.rank, world_size=self.size, timeout=_TIMEOUT)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def gather(self, value) -> list:
        """Everyone's value, by rank, on all ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
