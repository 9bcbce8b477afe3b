"""One way to run a model, whatever runs it: `Runner`, and the PyTorch, ONNX Runtime and TensorRT runners."""
