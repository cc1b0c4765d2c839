"""Product with 4-bit block-wise weights, eight rows interleaved: definition and ONNX body."""
