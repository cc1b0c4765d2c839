"""Operators, one folder each: reference.py (the definition), function.py (ONNX bodies), kernel.cc."""
