"""The random numbers are those of the paper, and each place has numbers of its own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastbptt import _core
from random_numbers import DROPOUT, ZONEOUT_C, keeps, philox

# From the known-answer vectors that its authors publish with the generator (Random123).
KNOWN = [
    ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0_A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "block"), KNOWN)
def test_the_generator_gives_the_published_answers(counter, key, block):
    assert _core.philox(counter, key) == block
    assert philox(np.array(counter), key).tolist() == block


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_drawn_from_the_words_that_the_header_names(seed):
    rng = np.random.default_rng(seed)
    key, draw = int(rng.integers(2**64, dtype=np.uint64)), int(rng.integers(4))
    layer, row = int(rng.integers(100)), int(rng.integers(2**32))
    step = int(rng.integers(2 ** rng.choice([4, 40])))
    n, p = int(rng.integers(1, 300)), float(rng.choice([0.0, 0.1, 0.5, 0.9]))
    mask = _core.draw_mask(key, draw, layer, step, row, p, n)
    np.testing.assert_array_equal(mask, keeps(key, draw, layer, p, [step], [row], n)[0, 0])


def test_a_mask_drops_the_share_that_it_is_told():
    n = 100_000
    for p in (0.0, 0.2, 0.5, 0.9):
        dropped = n - _core.draw_mask(7, DROPOUT, 0, 0, 0, p, n).sum()
        assert abs(dropped - n * p) <= 5 * np.sqrt(n * p * (1 - p))  # five standard deviations


def test_no_two_places_share_numbers():
    places = itertools.product([1, 2], [DROPOUT, ZONEOUT_C], [0, 1], [0, 2**32], [0, 5])
    masks = [tuple(_core.draw_mask(*place, 0.5, 256)) for place in places]
    assert len(set(masks)) == len(masks)
