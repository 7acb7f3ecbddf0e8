"""Kernel families of Arm alone."""
