/* The hash of random_bits.py, for kernels of the CPU and of a GPU: `bits`, an index of 32 bits or a
   vector of them, becomes random_bits(index, key), where the key is two words. */
#define MURMUR_FINALIZER(h)                                                          \
  ((h) ^= (h) >> 16, (h) *= 0x85EBCA6Bu, (h) ^= (h) >> 13, (h) *= 0xC2B2AE35u, (h) ^= (h) >> 16)
#define RANDOM_BITS(bits, key_0, key_1) \
  ((bits) ^= (key_0), MURMUR_FINALIZER(bits), (bits) ^= (key_1), MURMUR_FINALIZER(bits))
