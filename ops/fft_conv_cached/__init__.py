"""Causal long convolution of a chunk, with the inputs so far in a cache."""
