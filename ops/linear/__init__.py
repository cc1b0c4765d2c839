"""Product with float weights as a checkpoint has them: definition and ONNX body."""
