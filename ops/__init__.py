"""Operators: one folder each with reference.py (the definition), function.py (ONNX bodies) and, later, kernel.cc."""
