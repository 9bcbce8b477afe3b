"""ONNX operators as half-precision hardware computes them: FP32 inside, rounded to the type in which they are stored.

The rules, for a tensor of type T narrower than FP32 (FP16 or BF16):

- products (Conv, ConvTranspose, MatMul, Gemm, Einsum, AveragePool) accumulate in FP32 and round once, as tensor cores
  do;
- an elementwise operator computes in FP32 and rounds once. Sum, Mean, Max and Min of several tensors are a chain of
  operators of two, each of which rounds;
- a reduction whose definition stores something on the way rounds that too: the squares of ReduceL2 and
  ReduceSumSquare, the powers of ReduceLogSumExp, and every sum. 256² is infinite in FP16, and so is a sum beyond
  65504: this is how onnx-tensorrt imports them (`onnxOpImporters.cpp`, 10.1) and what ONNX's reference evaluator gives.
  Means accumulate in FP32;
- Softmax and LogSoftmax store nothing on the way: one kernel computes them in FP32 and rounds once, in TensorRT, torch
  and ONNX Runtime. Written as Exp, ReduceSum and Div they are three operators, of which each rounds;
- the statistics of LayerNormalization, RMSNormalization and GroupNormalization have the type that `stash_type` names
  (FP32 where an opset has no such attribute), their affine the type T (ONNX operators, LayerNormalization, "stage one"
  and "stage two"). Spelled out they are as many operators as were written. InstanceNormalization and BatchNormalization
  know no stages: they round once;
- Resize computes along one axis after another in FP32 and rounds once;
- QuantizeLinear divides by the scale in FP32 and rounds the quotient to the type of tensor and scale, or to the type
  that `precision` names (opset 23), and then to 8 bits, half to even. So an FP16 quotient rounds twice: ONNX's text
  says so since opset 23, and its reference evaluator does it in every opset. ONNX Runtime's CPU provider rounds once,
  as `precision` FLOAT asks for; of normal values (sigma 5, scale 0.1) 1.4 % differ by one step in INT8, and 0.6 % in
  E4M3FN. Where tensor and scale have different types the quotient is FP32, as in the reference evaluator; ONNX's text
  has the scale's type. Infinities saturate. NaN becomes the smallest integer, and stays NaN in float8;
- DequantizeLinear computes (x - zero point) * scale in FP32 and rounds once, to the scale's type or `output_dtype`.

Operators of ai.onnx up to opset 23, as far as exports of networks with ConvNeXt blocks hold them, heads for
segmentation and tagging included. What an operator cannot do is an InputError that names the attribute.
"""

from cnx_deploy.runners.emulator.arithmetic import ARITHMETIC, Operator
from cnx_deploy.runners.emulator.data_movement import DATA_MOVEMENT
from cnx_deploy.runners.emulator.quantization import QUANTIZATION
from cnx_deploy.runners.emulator.spatial import SPATIAL

__all__ = ["OPERATORS"]

OPERATORS: dict[str, Operator] = ARITHMETIC | SPATIAL | DATA_MOVEMENT | QUANTIZATION
"""By `op_type` of the default domain. Constant is no operator here: the graph reads it as a constant."""
