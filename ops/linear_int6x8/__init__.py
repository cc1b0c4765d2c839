"""Product with 6-bit block-wise weights, eight rows interleaved: definition and ONNX body."""
