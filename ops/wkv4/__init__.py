"""The RWKV-4 recurrence (a running softmax with decay): definition, ONNX bodies, differentiable form."""
