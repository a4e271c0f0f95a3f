"""Keeps freed memory in the process while training on a CPU.

glibc returns big blocks to the system and gets them back page by page, every step anew: up to half the time of an eager
step goes into page faults on the logits. Keeping the blocks costs nothing but the peak staying reserved.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed; returns whether it took effect (Linux with glibc only)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**28}
    return all(mallopt(option, value) == 1 for option, value in settings.items())
