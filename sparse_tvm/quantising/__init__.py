"""Which layers compute in how few bits, by what that does to the model's outputs on data."""
