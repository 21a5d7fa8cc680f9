"""Which errors are a lost rank, and what becomes of the others. Real hangs and lost ranks: tests/dist/test_hang.py."""

import pytest
import torch.distributed as dist

from megadsl.training.hang import lost_rank, lost_ranks_are_a_sentence

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/{}] {}"


@pytest.mark.parametrize("error, lost", [
    (RuntimeError(GLOO.format("pair.cc:553", "Connection closed by peer [127.0.0.1]:1. This is typically caused by a remote worker.")), True),
    (RuntimeError(GLOO.format("unbound_buffer.cc:78", "Timed out waiting 3000ms for recv operation to complete")), True),
    (RuntimeError("Application timeout caused pair closure"), True),
    (dist.DistStoreError("wait timeout after 2000ms, keys: /default_pg/0//1//cpu//0/1"), True),
    (dist.DistBackendError("NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error"), True),
    (dist.DistBackendError("NCCL error in: NCCLUtils.cpp:77, invalid usage; Duplicate GPU detected : rank 0 and rank 1"), False),
    (RuntimeError(GLOO.format("pair.cc:553", "op.preamble.length <= op.nbytes. 16 vs 8")), False),
    (RuntimeError("DataLoader timed out after 60 seconds"), False),
    (RuntimeError("the reader's socket /tmp/x does not exist"), False),
    (TimeoutError("timed out"), False),
])
def test_only_torch_distributed_loses_ranks(error, lost, tmp_path):
    assert lost_rank(error) == lost
    if not lost:
        with pytest.raises(type(error)) as raised, lost_ranks_are_a_sentence(0, tmp_path):
            raise error
        assert raised.value is error and not list(tmp_path.iterdir())
