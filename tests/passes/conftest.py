"""Lies here so that tests in folders below find ``helpers``."""
