"""Product with 4-bit block-wise weights: definition and ONNX body."""
