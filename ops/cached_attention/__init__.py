"""Causal attention of a chunk over a bounded cache of keys and values."""
