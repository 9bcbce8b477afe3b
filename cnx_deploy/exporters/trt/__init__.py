"""ONNX to TensorRT or TensorRT-RTX engines, and what the compiled engine does."""
