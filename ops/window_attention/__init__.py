"""Causal attention of a chunk over sinks and a window, whose keys and values are in a ring."""
