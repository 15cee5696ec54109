"""What the C library does with memory that this process has freed."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h, mallopt(3)
KEPT = 2**31 - 1  # bytes free at the heap's end; the most that mallopt takes
FROM_HEAP = 32 * 2**20  # bytes; larger blocks come from the system and go back to it, so that no heap is torn by them


def keep_freed_memory() -> bool:
    """Let the next step have what one has freed, instead of giving it back to the system and asking anew.

    On a CPU, where tensors are the C library's blocks: glibc gives its heap's end back after each pass through a model,
    and the next one meets every page of it as a new one, thousands of faults. That is about a twentieth of a small
    training step's time, and a third of an autoencoder's. The process then keeps its peak until it ends. No number
    changes. False where the library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all((mallopt(M_TRIM_THRESHOLD, KEPT), mallopt(M_MMAP_THRESHOLD, FROM_HEAP)))
