"""Kernel families of x86 alone."""
