"""Freed memory given back to the system: glibc keeps the pieces between what lives on."""

import ctypes

EVERY = 64
"""Matrices of some megabytes after which trimming pays."""


def trim() -> None:
    """Give back what can be given back; nothing where the C library is not glibc."""
    if release := getattr(ctypes.CDLL(None), "malloc_trim", None):
        release(0)
