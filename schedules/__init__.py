"""Kernels in TIR, for activations whose tokens lie in SIMD lanes, and a schedule for the rest.

``common/`` holds kernels parameterised by vector width and register count; a folder per
target family beside it holds what only that family needs.
"""
