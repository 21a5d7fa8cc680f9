"""Which device a process takes, and what DeepSpeed and Megatron-core are told of it. What needs no GPU to be proven."""

import os

import pytest
import torch

from megadsl.config.load import parse_config
from megadsl.parallel.device import device_ordinal, on_gpu, prepare_device
from megadsl.parallel.launch import Launch

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_LOCAL_RANK")


@pytest.fixture
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a test exports is taken back
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("visible, ordinals", [
    (4, [0, 1, 2, 3]),   # torchrun, deepspeed, srun --gpus-per-node=4: every process sees all
    (1, [0, 0, 0, 0]),   # srun --gpus-per-task=1: every process sees its own
    (2, [0, 1, 0, 1]),   # srun --gpus-per-task=2 with two processes in each task's share
])
def test_a_local_rank_becomes_a_visible_gpu(visible, ordinals):
    assert [device_ordinal(local_rank, visible) for local_rank in range(4)] == ordinals


@pytest.mark.parametrize("device, expected", [("cuda:0", "0"), ("cuda:3", "3"), ("cpu", "3")])
def test_deepspeed_is_told_the_ordinal(environment, device, expected):
    """DeepSpeed's engine, PipelineModule and ZeRO 3 call set_device(LOCAL_RANK); on a CPU it stays the launcher's."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    environment.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")  # mpirun's own count, with which DeepSpeed compares
    Launch(7, 8, 3, "127.0.0.1", 29500, "mpirun").export(torch.device(device).index)
    assert os.environ["LOCAL_RANK"] == expected and os.environ["RANK"] == "7"
    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    DeepSpeedEngine._configure_with_arguments(engine, None, None)
    assert engine.local_rank == int(expected)


def test_the_fused_addition_follows_the_device_of_the_run(monkeypatch):
    """training.device=cpu on a machine with a GPU: nothing is compiled for it."""
    from megadsl.model.layer import transformer_config

    prepare_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = parse_config({"model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}})
    assert not on_gpu() and not transformer_config(config.model).bias_dropout_fusion


def test_deterministic_kernels_are_asked_for_and_given_back(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    prepare_device("cpu", deterministic=True)
    try:
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        prepare_device("cpu")
    assert not torch.are_deterministic_algorithms_enabled()


def test_one_compiled_addition_serves_every_depth():
    """lambda and beta become inputs of the kernel: what Dynamo traces does not grow with the number of different ones."""
    from torch._dynamo.testing import CompileCounter

    from megadsl.model.residual import _scaled_add

    counter = CompileCounter()
    compiled = torch.compile(_scaled_add, backend=counter)
    hidden, bias = torch.ones(4, 2, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(8, dtype=torch.bfloat16)
    for layer in range(1, 50):
        scales = 1 - 1e-3 * layer, 1e-2 * layer
        torch.testing.assert_close(compiled(hidden, bias, hidden, 0.0, *scales), _scaled_add(hidden, bias, hidden, 0.0, *scales))
    assert counter.frame_count <= 3


def test_gpus_are_counted_by_what_the_ranks_hold():
    """Four tasks that see one GPU each are no crowd; two processes on one GPU are."""
    from megadsl.parallel.checks.node import _crowd

    assert _crowd(["a", "b", "c", "d"]) == "" == _crowd(["a"])
    assert "3 processes share 2 GPUs" in _crowd(["a", "b", "a"])
