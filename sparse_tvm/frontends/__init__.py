"""Doors through which models come in: one module per kind of model."""
