"""Gated linear attention: ONNX Runtime's LinearAttention, with a local function where it is missing."""
