"""Work on many tensors shared out over the ranks of a group, and the results sent to all of them."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

BUCKET_BYTES = 64 << 20  # sent at a time


def shares(sizes: Sequence[int], ranks: int) -> list[int]:
    """For every item the rank (0 to `ranks` - 1) that it falls to: consecutive items of about equal total size for each."""
    share, done, owners = -(-sum(sizes) // ranks) or 1, 0, []
    for size in sizes:
        owners.append(min(ranks - 1, (done + size // 2) // share))
        done += size
    return owners


def broadcast_from(owner: int, tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Copy `tensors`, all of one dtype and device, from rank `owner` of the group into those of its other ranks.

    They go in buckets, because a model has thousands of tensors of a few numbers.
    """
    source, is_owner = dist.get_global_rank(group, owner), dist.get_rank(group) == owner
    for bucket in _buckets(tensors):
        numbers = [tensor.numel() for tensor in bucket]
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket]) if is_owner else bucket[0].new_empty(sum(numbers))
        dist.broadcast(flat, src=source, group=group)
        if not is_owner:
            for tensor, part in zip(bucket, flat.split(numbers), strict=True):
                tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket, size = [], 0
    for tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if bucket and size + bytes_ > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += bytes_
    if bucket:
        yield bucket
