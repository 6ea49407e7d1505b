"""Generates random numbers without hidden state: every draw is a pure function of a key and an index.

A checkpoint therefore stores no state of a random generator. The order of the data, the marker positions and the
initial weights are the same for any number of processes, after every resume, and with every version of numpy.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stable_key(*parts) -> int:
    """Returns a 64-bit key for ints, strings, lists and tuples. Unlike `hash`, it is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def uniform_bits(key: int, counter: np.ndarray) -> np.ndarray:
    """Returns 64 random bits for every counter: output number `counter` of SplitMix64 seeded with `key` (Steele, Lea &
    Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).

    counter: integers of any shape. The result is uint64 of the same shape.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        z = np.array(counter, dtype=np.uint64)  # two buffers only: allocating more would cost more than the arithmetic
        high = np.empty_like(z)
        z *= _GOLDEN
        z += np.uint64(key) + _GOLDEN
        z ^= np.right_shift(z, np.uint64(30), out=high)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= np.right_shift(z, np.uint64(27), out=high)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= np.right_shift(z, np.uint64(31), out=high)
        return z


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Returns the images of `index` (integers in [0, n)) under a keyed pseudo-random permutation of [0, n).

    The permutation is a six-round Feistel network over the next power of four, with cycle-walking (Black & Rogaway,
    "Ciphers with arbitrary finite domains", 2002). Each element takes O(1) time and memory, however large n is."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64(2**half_bits - 1), np.uint64(half_bits)
    out = np.asarray(index).astype(np.uint64)
    walking = np.ones(out.shape, dtype=bool)
    while walking.any():
        left, right = out[walking] >> shift, out[walking] & mask
        for round_number in range(6):
            left, right = right, left ^ (uniform_bits(stable_key(key, round_number), right) & mask)
        out[walking] = (left << shift) | right
        walking = out >= n
    return out.astype(np.int64)


class Draws:
    """A sequence of random choices that depends on its key alone, for texts that are generated piece by piece."""

    def __init__(self, key: int):
        self._key, self._done, self._bits = key, 0, iter(())

    def below(self, n: int) -> int:
        """Returns an integer in [0, n). The bias of taking the remainder is below n / 2^64, which is negligible."""
        bits = next(self._bits, None)
        if bits is None:
            self._bits = iter(uniform_bits(self._key, np.arange(self._done, self._done + 256)).tolist())
            self._done += 256
            bits = next(self._bits)
        return bits % n

    def between(self, low: int, high: int) -> int:
        """Returns an integer in [low, high]."""
        return low + self.below(high - low + 1)

    def choice(self, options):
        """Returns one of the options."""
        return options[self.below(len(options))]

    def sample(self, options, k: int) -> list:
        """Returns k of the options in random order, without replacement. Raises ValueError if there are fewer."""
        if k > len(options):
            raise ValueError(f"cannot draw {k} of {len(options)} options without replacement")
        options = list(options)
        for i in range(k):
            j = i + self.below(len(options) - i)
            options[i], options[j] = options[j], options[i]
        return options[:k]
