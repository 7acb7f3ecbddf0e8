"""Passes of the CUDA backend: storage of activations, schedules for what has no kernel."""
