"""Kernel families of the CUDA backend."""
