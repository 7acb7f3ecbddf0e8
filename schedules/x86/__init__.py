"""Kernels and instructions of x86 CPUs."""
