"""Settings of the C library's allocator for the memory of CPU tensors.

glibc returns freed memory to the kernel once the end of the heap has 128 kB to 64 MB of it, and requests large blocks
directly from the kernel. A training step frees and allocates the same megabytes hundreds of times. Each time, every
page is mapped and zeroed again, which takes 10 to 25 % of a step's time on a virtual machine.
"""

import ctypes
import platform

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_ALL = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes this process keep freed memory for its next tensors. Returns True if the C library supports it.

    The process then keeps its peak size. Calling it again changes nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, _ALL), (_M_TOP_PAD, 64 << 20))
    return all([libc.mallopt(name, value) == 1 for name, value in settings])
