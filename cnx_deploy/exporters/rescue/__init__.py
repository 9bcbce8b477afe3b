"""Foreign ONNX graphs whose norms become FP32 islands: `patterns` finds them, `conversion` writes the FP16 graph."""
