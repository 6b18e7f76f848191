"""The two hashes behind splits and hashed ids, the same on every machine and for ever.

`mix64` is the finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
`hash_keys` is FNV-1a with 64 bits over the key's UTF-8 bytes, then `mix64`, because the low bits of FNV alone are
uneven; a hashed field puts a key into row `hash_keys(key) mod rows`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FNV_OFFSET = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)


def mix64(x: np.ndarray) -> np.ndarray:
    """Bijective mixing of uint64 values, any shape."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def counter_bits(seed: int, stream: int, counter: np.ndarray) -> np.ndarray:
    """64 random bits for each counter, a pure function of (seed, stream, counter).

    Args:
        seed: any non-negative integer below 2^64.
        stream: tells sequences of one seed apart.
        counter: uint64 or int64, any shape.
    """
    key = mix64(mix64(np.array([seed], np.uint64) + GOLDEN) ^ (np.array([stream], np.uint64) * GOLDEN))
    return mix64(counter.astype(np.uint64) * GOLDEN + key)


def uniform(bits: np.ndarray) -> np.ndarray:
    """Random bits as float64 in [0, 1), with the upper 53 of them."""
    return (bits >> np.uint64(11)) * 2.0**-53


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """64-bit hash of each key, uint64[len(keys)]."""
    encoded = [key.encode() for key in keys]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    order = np.argsort(-lengths, kind="stable")  # longest first: those with a byte at position p are a prefix
    starts = (np.cumsum(lengths) - lengths)[order]
    data = np.frombuffer(b"".join(encoded), np.uint8)
    ascending = -lengths[order]
    value = np.full(len(encoded), _FNV_OFFSET, np.uint64)
    for position in range(int(lengths.max(initial=0))):
        active = np.searchsorted(ascending, -position, side="left")
        value[:active] = (value[:active] ^ data[starts[:active] + position]) * _FNV_PRIME
    hashes = np.empty_like(value)
    hashes[order] = mix64(value)
    return hashes
