"""Kernels in TIR, for activations whose tokens lie in SIMD lanes, and a schedule for the rest.

``common/`` holds kernels parameterised by vector width and register count. What only one
target family needs gets a folder beside it.
"""
