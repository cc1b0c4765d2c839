"""Product with 8-bit block-wise weights: definition and ONNX body."""
