"""Memory that the C library keeps for a process, so that programs find it again without page faults."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>


def keep_memory() -> bool:
    """Makes the C library keep freed memory in the process; True where it can (glibc).

    On a CPU, XLA allocates a program's intermediate values anew at every call, and blocks beyond some 32 MiB come from
    the operating system page by page: a tenth to a fifth of a training step, or of a large network's inference. What is
    kept is at most what the process has held at any time. It holds for the whole process until its end, so the library
    never does it by itself: drivers do, and so may you, once, before the first step.

    Returns:
      Whether the C library took the settings.

    Example:
      >>> isinstance(compressx.keep_memory(), bool)
      True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or another system
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
