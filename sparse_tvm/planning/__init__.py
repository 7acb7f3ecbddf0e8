"""How far to prune each layer of a model, for a latency or a size that the user names."""
