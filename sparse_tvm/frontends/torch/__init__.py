"""PyTorch: exported programs, modules, and (if asked) their pickles."""
