"""Causal long convolution of a whole sequence."""
