"""Sparse weights: their formats, the structure found in them, and pruning."""
