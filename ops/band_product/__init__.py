"""Rows weighted by a band matrix: a causal convolution whose taps change with the token."""
