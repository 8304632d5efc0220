"""Random numbers that are a function of a key, the same in every form and on every device."""

from tinygrad import Tensor, dtypes


def random_bits(key: Tensor, count: int, first: Tensor | None = None) -> Tensor:
    """`count` uint32, each a hash of its index and the key (2,) uint32; the indices begin at 0, or
    at `first` (1,) uint32.

    Two rounds of the finalizer of MurmurHash3 (Appleby, public domain), a key word before each.
    Kernels have the same hash in random_bits.h.
    """
    bits = Tensor.arange(count, dtype=dtypes.uint32, device=key.device)
    if first is not None:
        bits = bits + first
    for word in (0, 1):
        bits = bits ^ key[word]
        bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
        bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
        bits = bits ^ (bits >> 16)
    return bits
