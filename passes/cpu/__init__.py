"""The CPU backend's passes: from a graph of operators to scheduled kernels on lane tiles."""
