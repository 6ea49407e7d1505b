"""Counter-based random numbers: every draw is a pure function of a key and an index.

Nothing here has state, so nothing has to be saved: the order of the data, the places of the markers and the
initial weights are the same for any number of processes, after any resume, and for any version of numpy.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stable_key(*parts) -> int:
    """A 64-bit key from ints, strings, and lists and tuples of them; the same on every machine (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def uniform_bits(key: int, counter: np.ndarray) -> np.ndarray:
    """64 random bits for every counter: output number `counter` of the generator SplitMix64 seeded with `key`
    (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).

    counter: integers of any shape -> uint64 of the same shape."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        z = np.array(counter, dtype=np.uint64)  # all in two buffers: fresh ones cost more than the arithmetic
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
    """The images of `index` (integers in [0, n)) under a keyed pseudo-random permutation of [0, n).

    A six-round Feistel network over the next even power of two with cycle-walking (Black & Rogaway, "Ciphers
    with arbitrary finite domains", 2002): any element in O(1) time and memory, however large n is."""
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
    """Random choices one after another, all a function of a key: for texts that are written piece by piece."""

    def __init__(self, key: int):
        self._key, self._done, self._bits = key, 0, iter(())

    def below(self, n: int) -> int:
        """An integer in [0, n). The remainder's bias, n / 2^64, is not felt."""
        bits = next(self._bits, None)
        if bits is None:
            self._bits = iter(uniform_bits(self._key, np.arange(self._done, self._done + 256)).tolist())
            self._done += 256
            bits = next(self._bits)
        return bits % n

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def choice(self, options):
        return options[self.below(len(options))]

    def sample(self, options, k: int) -> list:
        """k of the options without replacement, in random order; ValueError if there are fewer."""
        if k > len(options):
            raise ValueError(f"{k} of {len(options)} options cannot be drawn")
        options = list(options)
        for i in range(k):
            j = i + self.below(len(options) - i)
            options[i], options[j] = options[j], options[i]
        return options[:k]
