"""Makes the memory allocator of a process keep freed memory, so that a training step does not map it anew."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def keep_freed_memory() -> None:
    """Sets glibc's malloc to serve and keep blocks of up to 2 GB on its heap. Does nothing on other C libraries.

    By default, glibc returns every freed block above 32 MB to the operating system. A training step on a CPU frees and
    requests hundreds of such blocks, and mapping and zeroing their pages anew can take longer than the computation."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**31 - 1)
