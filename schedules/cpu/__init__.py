"""Kernels shared by every CPU target; widths and register counts come from the target."""
