"""From an nn.Module in the chunk form to an ONNX graph with its own state. Knows no family by name."""
