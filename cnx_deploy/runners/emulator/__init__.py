"""An ONNX graph evaluated operator by operator, each result rounded to its own type."""
