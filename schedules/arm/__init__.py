"""Kernels and instructions of Arm CPUs."""
