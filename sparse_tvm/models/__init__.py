"""Builders of example models, without any deep-learning framework."""
