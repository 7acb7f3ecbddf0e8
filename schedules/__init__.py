"""Kernels: TIR written for activations whose tokens lie in SIMD lanes, and a scheduler for the rest.

``common/`` holds kernels parameterised by vector width and register count; a folder per
target family beside it holds what only that family needs.
"""
