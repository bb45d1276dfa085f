"""How the C library's allocator treats the memory of CPU tensors.

glibc gives freed memory back to the kernel as soon as 128 kB to 64 MB of it lie at the end of the heap, and takes large
blocks straight from the kernel. A training step frees and asks for the same megabytes hundreds of times, and every page
of every one is then mapped and zeroed again: 10 to 25 % of a step's time on a virtual machine.
"""

import ctypes
import platform

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_ALL = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, for its next tensors; True where the C library is one that can.

    The process then stays as large as it has ever been. Calling it again changes nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, _ALL), (_M_TOP_PAD, 64 << 20))
    return all([libc.mallopt(name, value) == 1 for name, value in settings])
