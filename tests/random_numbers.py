"""The library's random numbers once more, in NumPy, from the paper and from fastbptt/random.h.

J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers: as easy as 1, 2,
3", SC 2011: Philox4x32-10.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DROPOUT, RECURRENT_DROPOUT, ZONEOUT_H, ZONEOUT_C = range(4)

_LOW = np.uint64(0xFFFFFFFF)


def philox(counter: Array, key: int) -> Array:
    """Blocks `[..., 4]` of 32-bit words at the counters `[..., 4]`."""
    w = [np.asarray(counter[..., i], np.uint64) for i in range(4)]
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        a, b = w[0] * np.uint64(0xD2511F53), w[2] * np.uint64(0xCD9E8D57)
        high_a, high_b = a >> np.uint64(32), b >> np.uint64(32)
        w = [high_b ^ w[1] ^ np.uint64(k0), b & _LOW, high_a ^ w[3] ^ np.uint64(k1), a & _LOW]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(w, -1)


def keeps(
    key: int, draw: int, layer: int, p: float, steps: Array, rows: Array, units: int
) -> Array:
    """Whether each unit stays, `[len(steps), len(rows), units]`, where p is less than 1."""
    t, b, j = np.meshgrid(
        np.asarray(steps, np.uint64),
        np.asarray(rows, np.uint64),
        np.arange(units, dtype=np.uint64),
        indexing="ij",
    )
    block = j // np.uint64(64) * np.uint64(16) + j % np.uint64(16)
    rest = np.uint64(draw << 28 | layer << 16) | t >> np.uint64(32)
    words = philox(np.stack([block, b, t & _LOW, rest], -1), key)
    own = np.take_along_axis(words, (j % np.uint64(64) // np.uint64(16))[..., None], -1)[..., 0]
    return own >= np.uint64(int(p * 2**32))
