"""Packing of small unsigned integers without gaps, the first in the lowest bits."""

import numpy as np

__all__ = ["pack", "packed_bytes", "unpack"]


def packed_bytes(count, width):
    """Return how many bytes `count` integers of `width` bits take."""
    return -(-count * width // 8)


def pack(values, width):
    """Return integers below 2**width as bytes, `width` bits each, padded with zero bits to a whole byte."""
    values = np.asarray(values, "uint8")
    bits = np.unpackbits(values[:, None], axis=1, count=width, bitorder="little")
    return np.packbits(bits.ravel(), bitorder="little")


def unpack(data, count, width):
    """Return the `count` integers that `pack` has packed; bits behind the last must be zero.

    Raises:
        ValueError: If `data` is longer or shorter than they take, or a bit behind the last is set.
    """
    if data.size != packed_bytes(count, width):
        raise ValueError(f"{count} integers of {width} bits take {packed_bytes(count, width)} bytes, not {data.size}")
    bits = np.unpackbits(data, bitorder="little")
    if bits[count * width :].any():
        raise ValueError(f"bits are set behind the last of {count} integers of {width} bits")
    return np.packbits(bits[: count * width].reshape(count, width), axis=1, bitorder="little").reshape(count)
