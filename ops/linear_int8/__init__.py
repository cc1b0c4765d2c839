"""The RWKV-7 recurrence (generalised delta rule): definition, ONNX bodies, differentiable chunk form."""
