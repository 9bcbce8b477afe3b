"""What an ONNX graph must satisfy before it is compiled or run, and what an export promises of its own graph.

Any file: standard operators, ONNX's own full check, no reduction in FP16. An export: opset, operator counts, epsilons,
GELU's form, a symbolic batch. This module loads neither torch nor ONNX Runtime: a child that starts with it is ready at
once.

The FP16 rule is static because a CPU cannot show the fault: ONNX Runtime's CPU provider computes FP16 graphs in FP32
and hides every overflow (microsoft/onnxruntime issue 11831).
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import onnx
from google.protobuf.message import DecodeError

from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import CorruptArtifactError, GraphCheckError, RefusedArtifactError
from cnx_deploy.core.gates import OutputSpec
from cnx_deploy.core.image_size import STRIDE, stage_sides
from cnx_deploy.core.variants import Variant
from cnx_deploy.exporters.untrusted import limits_for, read_onnx

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "ELEMENTS",
    "Admission",
    "GraphFacts",
    "admission_task",
    "admit_onnx",
    "check_export",
    "check_graph",
    "half_reductions",
    "load_model",
]

REDUCING_OPERATORS = """
AveragePool GlobalAveragePool GlobalLpPool GroupNormalization InstanceNormalization LayerNormalization LogSoftmax
LpNormalization LpPool MeanVarianceNormalization RMSNormalization ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
ReduceMean ReduceProd ReduceSum ReduceSumSquare Softmax
"""
REDUCTIONS = frozenset(REDUCING_OPERATORS.split())
OTHER_OPERATORS = """
Abs Add And ArgMax ArgMin BatchNormalization Cast CastLike Ceil Clip Concat Constant ConstantOfShape Conv ConvTranspose
Cos CumSum DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand Flatten Floor
Gather GatherElements GatherND Gelu Gemm GlobalMaxPool Greater GreaterOrEqual HardSigmoid HardSwish Identity LeakyRelu
Less LessOrEqual Log MatMul MatMulInteger Max MaxPool Mean Min Mish Mod Mul Neg Not Or PRelu Pad Pow QLinearConv
QLinearMatMul QuantizeLinear Range Reciprocal ReduceMax ReduceMin Relu Reshape Resize Round ScatterND Selu Shape Sigmoid
Sign Sin Size Slice Softplus SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tanh Tile TopK Transpose Trilu Unsqueeze
Upsample Where Xor
"""
OPERATORS = REDUCTIONS | frozenset(OTHER_OPERATORS.split())
"""Of tensors of numbers, without graphs of their own, text, pictures or chance: what exporters write of classifiers."""

FIRST_OPSET = 7
"""The first whose operators broadcast as today; ONNX Runtime and TensorRT promise nothing for earlier ones."""

LARGEST_VALUE = 1 << 32
"""Elements of one value in the graph; huge at 512 px has 2.3e7 an image, or 1.5e9 with a fixed batch of 64."""

LARGEST_EPSILON = 1e-3
ELEMENTS = {"float32": "FLOAT", "int64": "INT64"}
"""torch's name of an output's type -> ONNX's."""
SUBGRAPHS = frozenset({onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS})
HALVES = frozenset({onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})
FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, *HALVES})
STANDARD = frozenset({"", "ai.onnx"})
LISTED_AT_MOST = 20

CHECK_VERSIONS = "Use the versions that constraints.txt names; found were:"
EXPORT_IT = "Export the network with cnx-deploy export, or write these otherwise:"
RESCUE_IT = "Export the network with cnx-deploy export, or make FP32 islands of these with cnx-deploy rescue:"


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """What a graph consists of. `types` counts node outputs by element type, `operators` nodes by operator.

    `epsilons` are those of its norms: LayerNormalization's attribute, and any constant below 1e-3 that is added.
    `outside_files` are the paths of the files that hold weights outside the graph's own. `mirrored_axes` are the axes
    along which a Slice reads a tensor backwards, one entry a Slice.
    """

    opset: int
    operators: Mapping[str, int]
    types: Mapping[str, int]
    inputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    metadata: Mapping[str, str]
    epsilons: tuple[float, ...]
    gelu_forms: frozenset[str]
    outside_files: tuple[str, ...] = ()
    mirrored_axes: tuple[int, ...] = ()

    @property
    def half_share(self) -> float:
        """Share of FP16 and BF16 among the floating-point node outputs."""
        floating = {name: count for name, count in self.types.items() if name in ("FLOAT", "FLOAT16", "BFLOAT16")}
        return 1.0 - floating.get("FLOAT", 0) / max(1, sum(floating.values())) if floating else 0.0


@dataclass(frozen=True, slots=True)
class Admission:
    """What is known of a foreign file that `admit_onnx` let in. `files`: the identity of each file that it reads."""

    path: Path
    facts: GraphFacts
    files: Mapping[str, tuple[int, ...]]

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files, which the limits of a trial run go by."""
        return sum(identity[2] for identity in self.files.values())

    def check_unchanged(self) -> None:
        """Raise CorruptArtifactError where a file is another one than was checked."""
        for name, identity in self.files.items():
            if not Path(name).exists() or _identity(name) != identity:
                raise CorruptArtifactError(f"{name} was changed while {self.path.name} was checked. Try again.")


def check_graph(
    path: Path, listed: Collection[str] | None = None, *, allows_half_reductions: bool = False
) -> GraphFacts:
    """Check any ONNX file and return what is in it.

    Args:
        path: the ONNX file. It is parsed in this process, so a file of unknown origin goes to `admit_onnx`.
        listed: names of the files that its manifest lists. The graph may read no other.
        allows_half_reductions: for `rescue`, which is given such files to mend them.

    Raises:
        RefusedArtifactError: the file is beyond a limit, reads outside its folder, or holds other than standard
            operators of image classifiers.
        CorruptArtifactError: the file is not valid ONNX.
        GraphCheckError: the graph reduces in half precision. The message lists every such node.
    """
    file = read_onnx(path, listed)
    model = file.model
    if problems := list(_foreign_parts(model)):
        raise RefusedArtifactError(_listed(f"{path.name} is refused. {EXPORT_IT}", problems))
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, DecodeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["it cannot be parsed"])[0]
        # torch's older exporter writes it of timm's norms after `.half()`: gains stay half, tensors are FP32.
        how = " with torch.onnx.export(..., dynamo=True), or in FP32" if "inconsistent type" in str(error) else ""
        raise CorruptArtifactError(f"{path} is not a valid ONNX file ({reason}). Export it again{how}.") from error
    if problems := list(_large_values(model)):
        raise RefusedArtifactError(_listed(f"{path.name} is refused. {EXPORT_IT}", problems))
    if not allows_half_reductions and (problems := list(half_reductions(model))):
        raise GraphCheckError(_listed(f"{path.name} breaks the rules for an engine. {RESCUE_IT}", problems))
    return _facts(model, tuple(map(str, file.outside)))


def admit_onnx(path: Path, limits: Limits | None = None, *, allows_half_reductions: bool = False) -> Admission:
    """Check a file that no manifest names, in a child process with limits of time and memory.

    Without `limits` they go by the file's size; `allows_half_reductions` is that of `check_graph`. Raises what
    `check_graph` raises, RefusedArtifactError where the child is ended, and CorruptArtifactError where the file changes
    meanwhile.
    """
    answer = run_isolated(
        "cnx_deploy.exporters.graph_checks:admission_task",
        {"path": str(path.parent.resolve() / path.name), "allows_half_reductions": allows_half_reductions},
        limits or limits_for(path.stat().st_size if path.is_file() else 0),
        what=f"Checking {path.name}",
        failure=RefusedArtifactError,
    )
    try:
        facts, files = msgspec.convert(answer, tuple[GraphFacts, dict[str, tuple[int, ...]]])
    except msgspec.ValidationError as error:  # the child has parsed what anybody wrote: its word is data from outside
        raise RefusedArtifactError(
            f"Checking {path.name} failed: its process gave another answer than was asked for ({error}). Export the "
            "model again, from a source you trust."
        ) from error
    admission = Admission(path, facts, files)
    admission.check_unchanged()
    return admission


def admission_task(path: str, *, allows_half_reductions: bool = False) -> list[Any]:
    """`admit_onnx` for the child: the facts, and the identity of every file that the graph reads."""
    before = _identity(path)
    facts = check_graph(Path(path), allows_half_reductions=allows_half_reductions)
    files = {path: before, **{name: _identity(name) for name in facts.outside_files}}
    return [msgspec.to_builtins(facts), files]


def check_export(
    path: Path,
    *,
    variant: Variant,
    layout: str,
    batch: tuple[int, int, int],
    opset: int,
    outputs: Sequence[OutputSpec],
    head_operators: Mapping[str, int],
    leave_out: Collection[str] = (),
    norm_on_patches: bool = False,
    open_size: bool = False,
    mirrored_axes: tuple[int, ...] = (),
    image_shape: tuple[int | str, ...] | None = None,
) -> GraphFacts:
    """Check a file that `exporters.onnx` wrote, on top of `check_graph`.

    One Gelu a block and, but in V1, one GRN statistic, a pool ("cpu"), a norm ("openvino") or a sum; each of the
    network's norms one LayerNormalization, or, in the "gpu" layout, spelled out over the channel axis for the
    channels-first ones (four and what the head adds); opset as written; batch axis named.

    Args:
        path: the file as it was written.
        variant: the network's size and version.
        layout: "cpu", "gpu" or "openvino", the deploy form's layout.
        batch: smallest, typical and largest batch; equal ends give a fixed axis.
        opset: the opset that was asked for.
        outputs: what the task declares.
        head_operators: the counted operators that the task's head adds, as `model.tasks.base.Task` describes.
        leave_out: folds that the export was to leave out.
        norm_on_patches: whether the stem's norm is a sum over the patches' channels.
        image_shape: the axes of the input after the batch, open ones by name; None: not checked.
        open_size: whether height and width are open: GRN's statistic is then a sum in the first two layouts.
        mirrored_axes: the images' width where the export averages over the mirrored images, else nothing.

    Raises:
        GraphCheckError: the graph is another one; the message lists every difference.
    """
    facts = check_graph(path)
    token_norms = variant.block_count + head_operators.get("LayerNormalization", 0)
    first_norms = 4 + head_operators.get("ChannelsFirstNorm", 0)
    responses = variant.block_count if variant.version == 2 else 0
    statistic = "ReduceSum"
    if layout == "cpu" and "blocked" not in leave_out and not open_size:
        statistic = "AveragePool"
    elif layout == "openvino" and "channels-last" not in leave_out:
        statistic = "ReduceL2"
    expected = {
        "Gelu": variant.block_count + head_operators.get("Gelu", 0),
        statistic: responses + norm_on_patches + head_operators.get(statistic, 0),
        "LayerNormalization": token_norms + (0 if layout == "gpu" else first_norms),
    }
    problems = [
        f"{count} {operator} expected, {facts.operators.get(operator, 0)} found"
        for operator, count in expected.items()
        if facts.operators.get(operator, 0) != count
    ]
    problems.extend(
        _wrong_constants(facts, norms=responses + token_norms + first_norms + head_operators.get("epsilon", 0))
    )
    if facts.mirrored_axes != mirrored_axes:
        problems.append(f"mirrored axes {list(mirrored_axes)} expected, {list(facts.mirrored_axes)} found")
    if facts.opset != opset:
        problems.append(f"opset {opset} expected, {facts.opset} written")
    batch_axis = "batch" if batch[0] != batch[2] else batch[0]
    if list(facts.inputs) != ["images"]:
        problems.append(f"one input 'images' expected, found {list(facts.inputs)}")
    for name, (_, shape) in facts.inputs.items():
        if image_shape is not None and tuple(shape[1:]) != image_shape:
            problems.append(f"images of {image_shape} expected, {name} takes {tuple(shape[1:])}")
    promised = {spec.name: (ELEMENTS[spec.dtype], (batch_axis, *spec.shape)) for spec in outputs}
    if list(facts.outputs.items()) != list(promised.items()):
        problems.append(f"outputs {promised} expected, found {dict(facts.outputs)}")
    problems.extend(
        f"first axis of {name} is {shape[0]!r}, not {batch_axis!r}"
        for name, (_, shape) in facts.inputs.items()
        if shape[0] != batch_axis
    )
    if problems:
        raise GraphCheckError(_listed(f"{path.name} is not the graph that was asked for. {CHECK_VERSIONS}", problems))
    return facts


def load_model(path: Path) -> "ir.Model":
    """Read a checked file as onnx_ir's model; weights outside the file are read when they are asked for.

    Raises CorruptArtifactError for a file that is no ONNX model.
    """
    import onnx_ir as ir
    from onnx_ir.serde import SerdeError

    try:
        return ir.load(path)
    except (DecodeError, SerdeError, ValueError) as error:
        raise CorruptArtifactError(f"{path} is not an ONNX model ({error}). Export it again.") from error


def half_reductions(model: onnx.ModelProto) -> Iterator[str]:
    """Name every node that reduces, normalises or squares in FP16 or BF16; the model must carry inferred types.

    A sum of squares over 56×56 positions leaves the FP16 range once the RMS passes 4.6, and a square itself once
    the value passes 256. Matrix products and convolutions are not meant: TensorRT accumulates them in FP32.
    """
    types = _element_types(model)
    for node in model.graph.node:
        halves = [name for name in node.input if types.get(name) in HALVES]
        if not halves:
            continue
        squares = node.op_type == "Mul" and node.input[0] == node.input[1]
        if node.op_type in REDUCTIONS or squares or node.op_type == "Pow":
            kind = onnx.TensorProto.DataType.Name(types[halves[0]])
            yield (
                f"{node.name or node.output[0]}: {node.op_type} computed in {kind}; "
                "its sum of squares can overflow. Cast its input to FLOAT"
            )


def _foreign_parts(model: onnx.ModelProto) -> Iterator[str]:
    """What is no plain graph of standard operators on tensors."""
    opsets = [entry.version for entry in model.opset_import if entry.domain in STANDARD]
    newest = onnx.defs.onnx_opset_version()
    if len(opsets) != 1 or not FIRST_OPSET <= opsets[0] <= newest:
        yield f"opset {opsets or 'missing'}; expected one from {FIRST_OPSET} to {newest}"
    if domains := {entry.domain for entry in model.opset_import} - STANDARD:
        yield f"operator domains {sorted(domains)} are not standard ONNX"
    for node in model.graph.node:
        name = node.name or (node.output[0] if node.output else "a node without a name")
        if node.domain not in STANDARD:
            yield f"{name}: {node.domain}::{node.op_type} is not a standard operator"
        elif any(attribute.type in SUBGRAPHS for attribute in node.attribute):
            yield f"{name}: {node.op_type} holds a graph of its own, which these checks do not look into"
        elif node.op_type not in OPERATORS:
            yield f"{name}: {node.op_type} is no operator of image classifiers"
        if any(attribute.HasField("sparse_tensor") or attribute.sparse_tensors for attribute in node.attribute):
            yield f"{name}: {node.op_type} holds a sparse tensor"
    if model.graph.sparse_initializer:
        yield f"{len(model.graph.sparse_initializer)} sparse tensors; expected none"
    if model.functions:
        yield f"{len(model.functions)} local functions; expected none"
    if model.training_info:
        yield "graphs for training; expected none"


def _large_values(model: onnx.ModelProto) -> Iterator[str]:
    """Values whose known sizes alone make them larger than any of this network's."""
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim if axis.HasField("dim_value")]
        if math.prod(sizes) > LARGEST_VALUE:
            yield f"{value.name}: {math.prod(sizes):,} elements, where at most {LARGEST_VALUE:,} are expected"


def _wrong_constants(facts: GraphFacts, norms: int) -> Iterator[str]:
    """What no comparison of logits shows: GELU's form, and an epsilon where the statistics are of the order of one.

    An average pool takes the mean square where GRN takes the sum, so there eps is divided by the root of the
    map's positions.
    """
    from cnx_deploy.model.layers import EPS  # with it torch, which an export has loaded by now

    if facts.gelu_forms - {"none"}:
        yield f"Gelu by erf expected, {sorted(facts.gelu_forms)} found"
    shapes = [shape[1:] for _, shape in facts.inputs.values()]
    # Of (N, 3, H, W) and (N, H, W, 3) the sides are what has the network's least size.
    sizes = [tuple(size for size in shape if isinstance(size, int) and size >= STRIDE) for shape in shapes]
    maps = [stage_sides((size[0], size[1]), stage) for size in sizes if len(size) == 2 for stage in range(4)]
    right = [EPS, *(EPS / math.sqrt(math.prod(sides)) for sides in maps)]
    wrong = [eps for eps in facts.epsilons if not any(math.isclose(eps, value, rel_tol=1e-4) for value in right)]
    if wrong:
        yield f"every epsilon is {EPS:g}, found {', '.join(f'{value:g}' for value in sorted(set(wrong)))}"
    if len(facts.epsilons) != norms:
        yield f"{norms} epsilons expected, one a norm and a GRN, {len(facts.epsilons)} found"


def _listed(title: str, problems: list[str]) -> str:
    more = [f"and {len(problems) - LISTED_AT_MOST} more"] if len(problems) > LISTED_AT_MOST else []
    return "\n  ".join([title, *problems[:LISTED_AT_MOST], *more])


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    return types


def _facts(model: onnx.ModelProto, outside_files: tuple[str, ...]) -> GraphFacts:
    types = _element_types(model)
    name_of = onnx.TensorProto.DataType.Name
    outputs = Counter(name_of(types[name]) for node in model.graph.node for name in node.output if name in types)
    return GraphFacts(
        opset=next(entry.version for entry in model.opset_import if entry.domain in STANDARD),
        operators=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        types=dict(sorted(outputs.items())),
        inputs={value.name: _tensor_spec(value) for value in model.graph.input},
        outputs={value.name: _tensor_spec(value) for value in model.graph.output},
        metadata={entry.key: entry.value for entry in model.metadata_props},
        epsilons=tuple(_epsilons(model)),
        gelu_forms=frozenset(
            next((entry.s.decode(errors="replace") for entry in node.attribute if entry.name == "approximate"), "none")
            for node in model.graph.node
            if node.op_type == "Gelu"
        ),
        outside_files=outside_files,
        mirrored_axes=tuple(_mirrored_axes(model)),
    )


def _mirrored_axes(model: onnx.ModelProto) -> Iterator[int]:
    """The axes whose step is below zero in a Slice with constant axes and steps."""
    inside = (each for each in model.graph.initializer if each.data_location != onnx.TensorProto.EXTERNAL)
    constants = {tensor.name: tensor for tensor in inside}
    for node in model.graph.node:
        if node.op_type == "Slice" and len(node.input) == 5 and set(node.input[3:]) <= constants.keys():
            axes, steps = (onnx.numpy_helper.to_array(constants[name]).flatten() for name in node.input[3:])
            yield from (int(axis) for axis, step in zip(axes, steps, strict=False) if step < 0)


def _epsilons(model: onnx.ModelProto) -> Iterator[float]:
    scalars = {
        tensor.name: float(onnx.numpy_helper.to_array(tensor).reshape(()))
        for tensor in model.graph.initializer
        if tensor.data_type in FLOATS
        and tensor.data_location != onnx.TensorProto.EXTERNAL
        and math.prod(tensor.dims) == 1
    }
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            yield next((entry.f for entry in node.attribute if entry.name == "epsilon"), 1e-5)
        elif node.op_type == "Add":
            yield from (scalars[name] for name in node.input if 0.0 < scalars.get(name, 0.0) < LARGEST_EPSILON)


def _tensor_spec(value: onnx.ValueInfoProto) -> tuple[str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return onnx.TensorProto.DataType.Name(tensor.elem_type), shape


def _identity(name: str) -> tuple[int, ...]:
    """Which file this is and when it was last changed."""
    status = Path(name).stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
