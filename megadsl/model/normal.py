"""Normal numbers by position: number i of a stream is a function of (key, i), so any range of it can be drawn on its own.

A stream is numpy's PCG64DXSM, whose raw output is frozen over numpy's versions (NEP 19) and which jumps to any position
(`advance`). torch's generators on the CPU cannot jump, and take only 32 bits of a seed, which is few for millions of streams.
64 raw bits make two numbers by the method of Box and Muller (1958).
"""

from math import pi

import numpy as np

CHUNK = 1 << 14  # pairs at a time: they stay in the second-level cache


def normal_numbers(key: int, start: int, count: int, std: float) -> np.ndarray:
    """Numbers [start, start + count) of stream `key`: fp32, mean 0, standard deviation `std`.

    Nothing is drawn beside them, except the other half of a pair at an odd end. Equal on all ranks and for any cut, because no
    operation here looks at an element's neighbours. numpy lets other threads run meanwhile.

    Args:
        key: at most 128 bits; streams of different keys are independent.
    """
    first, end = start // 2, -(-(start + count) // 2)
    generator = np.random.PCG64DXSM(key)
    generator.advance(first)
    pairs = np.empty((end - first, 2), np.float32)
    for at in range(0, len(pairs), CHUNK):
        _fill(pairs[at:at + CHUNK], generator, std)
    return pairs.reshape(-1)[start - 2 * first:][:count]


def _fill(pairs: np.ndarray, generator: np.random.BitGenerator, std: float) -> None:
    """`pairs` [n, 2] become the next 2 n numbers."""
    bits = generator.random_raw(len(pairs)).view(np.int32).reshape(-1, 2)
    radius, angle = bits[:, 0].astype(np.float32), bits[:, 1].astype(np.float32)
    np.abs(radius, out=radius)
    radius += np.float32(0.5)
    radius *= np.float32(2.0**-31)  # uniform in (0, 1], 2^-32 at least: numbers of up to 6.6 deviations
    np.log(radius, out=radius)
    radius *= np.float32(-2.0)
    np.sqrt(radius, out=radius)
    radius *= np.float32(std)
    angle *= np.float32(pi / 2**31)  # uniform in [-pi, pi]
    np.multiply(radius, np.cos(angle), out=pairs[:, 0])
    np.multiply(radius, np.sin(angle, out=angle), out=pairs[:, 1])
