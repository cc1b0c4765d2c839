"""Quantization: schemes as rows of data, one algorithm a file, a reason for every tensor."""
