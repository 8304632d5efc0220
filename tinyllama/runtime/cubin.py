"""What a cubin, NVIDIA's machine code, says about its kernel: registers, spills, shared memory.

A cubin is an ELF file; `.nv.info` holds its attributes as (form, attribute, size) and a value.
"""

import struct

REGISTERS, FRAME_BYTES = 0x2F, 0x11  # attributes of .nv.info
_NO_CONTENT = 8  # the kind of a section that takes room only when it is loaded


def sections(cubin: bytes) -> dict[str, tuple[bytes, int]]:
    """Content and size of each section of an ELF file of 64 bits."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    entry, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, start + entry * i) for i in range(count)]
    names = headers[names_at][4]
    found = {}
    for name, kind, _, _, offset, size, *_ in headers:
        word = cubin[names + name : cubin.index(b"\0", names + name)].decode()
        found[word] = (b"" if kind == _NO_CONTENT else cubin[offset : offset + size], size)
    return found


def attributes(cubin: bytes) -> dict[int, int]:
    """The attributes of .nv.info that hold a kernel's number and a value."""
    info = sections(cubin)[".nv.info"][0]
    found, at = {}, 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:  # `size` bytes follow
            if size == 8:
                found[attribute] = struct.unpack_from("<II", info, at)[1]
            at += size
    return found


def shared_bytes(cubin: bytes) -> int:
    """Bytes of shared memory that the kernel declares, and what the card reserves beside them."""
    return sum(size for name, (_, size) in sections(cubin).items() if ".nv.shared." in name)


def spilled_bytes(cubin: bytes) -> int:
    """Bytes per thread of the stack, where registers that do not fit are kept."""
    return attributes(cubin).get(FRAME_BYTES, 0)
