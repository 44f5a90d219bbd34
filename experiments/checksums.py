"""Checksums of arrays that do not depend on their sharding over devices and processes.

That of a leaf is the sum over its entries, modulo 2^64, of a 32-bit hash of the entry's place and bits: each process
sums what it holds, and the sums add up. Damage goes unnoticed with a probability of about 2^-32.
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsparse.trees import by_path

_BLOCK = 1 << 15  # entries that stay in a core's cache while they are hashed


class Part(NamedTuple):
    """The part of a leaf that a process holds.

    Attributes:
      sum: over the entries that it answers for.
      whole: whether these are all; every process then answers for the leaf.
    """

    sum: int
    whole: bool


def parts(state: Any) -> dict[str, Part]:
    """This process's share of the checksum of every leaf, by path, computed without communication."""
    found = {}
    for path, leaf in by_path(state).items():
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        seed = zlib.crc32(f"{path} {leaf.dtype} {leaf.shape}".encode())
        whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
        if whole:
            pieces = [((slice(None),) * leaf.ndim, np.asarray(leaf))]
        else:  # every piece is the replica 0 of one process
            pieces = [(s.index, np.asarray(s.data)) for s in leaf.addressable_shards if s.replica_id == 0]
        total = sum(_sum(piece, index, leaf.shape, seed) for index, piece in pieces)
        found[path] = Part(total % 2**64, whole)
    return found


def together(parts: dict[str, Part]) -> dict[str, str]:
    """The checksums of the parts of all processes, hexadecimal, by path; all processes call this together."""
    first = jax.process_index() == 0
    sums = np.array([[part.sum if first or not part.whole else 0 for part in parts.values()]], np.uint64)
    # JAX has no integers of 64 bits by default.
    everywhere = multihost_utils.process_allgather(sums.view(np.uint32), tiled=True)
    totals = np.ascontiguousarray(everywhere).view(np.uint64).sum(0)
    return {path: f"{total:016x}" for path, total in zip(parts, totals, strict=True)}


def differing(saved: dict[str, str], parts: dict[str, Part]) -> list[str]:
    """The paths of leaves whose checksums differ from the saved ones; all processes call this together."""
    now = together(parts)
    wrong = {path for path in {*saved, *now} if saved.get(path) != now.get(path)}
    # The sum is that of the first process; others have read the leaf too.
    wrong |= {path for path, part in parts.items() if part.whole and f"{part.sum:016x}" != saved.get(path)}
    return sorted(wrong)


def _sum(piece: np.ndarray, index: Sequence[slice], shape: tuple[int, ...], seed: int) -> int:
    """Over the entries of a piece of an array of that shape, which lies at the index in it."""
    if not piece.size:
        return 0
    word = {1: np.uint8, 2: np.uint16}.get(piece.dtype.itemsize, np.uint32)
    bits = np.asarray(piece, order="C").reshape(*piece.shape, 1).view(word)  # its last axis: the words of an entry
    place: Any = np.zeros((), np.uint32)
    for part, size, length in zip([*index, slice(None)], [*shape, bits.shape[-1]], bits.shape, strict=True):
        start = part.indices(size)[0]
        place = np.add.outer(place * np.uint32(size), np.arange(start, start + length, dtype=np.uint32))
    place, bits, total = place.ravel(), bits.ravel(), 0
    for start in range(0, bits.size, _BLOCK):
        mixed = place[start : start + _BLOCK] * np.uint32(0x9E3779B1)
        mixed += np.uint32(seed)
        mixed ^= bits[start : start + _BLOCK]
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # the finaliser of MurmurHash3
            mixed ^= mixed >> np.uint32(shift)
            mixed *= np.uint32(factor)
        total += int(mixed.sum(dtype=np.uint64))
    return total
