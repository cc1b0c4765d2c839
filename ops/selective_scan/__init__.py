"""The Mamba-1 recurrence (selective scan): definition, ONNX bodies, differentiable form."""
