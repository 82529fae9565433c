"""Kernels, Triton for GPUs and numba for CPUs, each equal to a torch twin that tests compare it with."""
