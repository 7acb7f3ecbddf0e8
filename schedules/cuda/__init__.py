"""Kernels for NVIDIA's GPUs."""
