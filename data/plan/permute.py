"""Shuffled epochs without a table: a Feistel network maps each position to an index.

Positions count on for ever: position // size is the epoch, and each epoch is another permutation.
The network permutes a power of two; what falls outside ``size`` goes through again (cycle-walking).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 6
"""Even, so that the two halves end where they began."""
_MIN_BITS = 8
"""Smaller domains mix badly: a half of one or two bits has next to nothing to decide."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive_key(seed: int, *names: str | int) -> int:
    """64-bit key of one purpose under a seed; the same on every machine."""
    text = repr((seed, *names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def shuffled(positions: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Indices at some positions of an endless stream of shuffled epochs.

    Args:
        positions: (N,) any positions >= 0, in any order.
        size: indices in an epoch, >= 1.
        key: which stream; see ``derive_key``.

    Returns:
        (N,) in [0, size). Over positions [e * size, (e + 1) * size) every index appears once.
    """
    epochs, places = np.divmod(positions.astype(np.uint64), np.uint64(size))
    round_keys = [_mix(np.full_like(epochs, key) + epochs * _GOLDEN)]
    while len(round_keys) < _NUM_ROUNDS:
        round_keys.append(_mix(round_keys[-1] + _GOLDEN))
    num_bits = max((size - 1).bit_length(), _MIN_BITS)

    result = _feistel(places, round_keys, num_bits)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        keys = [round_key[outside] for round_key in round_keys]
        result[outside] = _feistel(result[outside], keys, num_bits)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], round_keys: list[NDArray[np.uint64]], num_bits: int
) -> NDArray[np.uint64]:
    """A permutation of [0, 2**num_bits) per key; unequal halves trade places every round."""
    right_bits = num_bits // 2
    left_bits = num_bits - right_bits
    left = values >> np.uint64(right_bits)
    right = values & _ones(right_bits)
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right + round_key) & _ones(left_bits))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _ones(num_bits: int) -> np.uint64:
    return np.uint64((1 << num_bits) - 1)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every input bit changes half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
