"""Imported modules that were saved, with their weights beside them."""
