"""From an ONNX file to a parsed network and a serialised engine, with every failure made an error.

The TensorRT API reports most failures by returning None or False and a log line. Here each becomes a BuildError that
carries the log's last errors.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx

from cnx_deploy.core.errors import BuildError, InputError
from cnx_deploy.core.image_size import parse_image_size, sides
from cnx_deploy.core.manifest import TypeCensus
from cnx_deploy.exporters.trt.backend import Backend

__all__ = ["NetworkBuild", "Progress", "half_share", "type_census"]

Progress = Callable[[str, float], None]

LAYERNORM_WARNING = "Detected layernorm nodes in FP16"
NOTICES = ("catchCudaError", "The logger passed into")
"""Lines that say nothing of the build: there is no GPU; another builder of this process has another logger."""
RANGE_WORDS = ("overflow", "subnormal", "out of range", "out-of-range", "underflow")


class NetworkBuild:
    """One parse and build with its own builder and log; not to be shared between threads.

    `libraries`: of plugins, which the engine takes along.
    """

    def __init__(self, backend: Backend, onnx_path: Path, libraries: Sequence[Path] = ()) -> None:
        self.backend = backend
        self.onnx_path = onnx_path
        self.libraries = tuple(map(str, libraries))
        self.log = backend.recording_logger()
        trt = backend.trt
        self.builder = trt.Builder(self.log)
        self.network = self.builder.create_network(backend.network_flags)
        if self.network is None:
            raise self.error("made no network")
        parser = trt.OnnxParser(self.network, self.log)
        # From a path, not from bytes: only so are weights in an external file found.
        if not parser.parse_from_file(str(onnx_path)):
            reasons = "; ".join(str(parser.get_error(index)).strip() for index in range(parser.num_errors))
            raise self.error(f"cannot read it: {reasons or 'no reason given'}")

    def fix_batch(self, batch: int) -> None:
        """Make every open axis concrete, so that every size in the compiler's log is; images get their typical size."""
        for index in range(self.network.num_inputs):
            tensor = self.network.get_input(index)
            _, tensor.shape, _ = self._shapes(tensor.shape, (batch, batch, batch))

    def _shapes(self, shape: Any, batches: tuple[int, int, int]) -> list[tuple[int, ...]]:
        """The smallest, typical and largest shape of an input; InputError for an open axis without a known range."""
        first, *others = tuple(shape)
        ranges = iter(self._open_sides() if -1 in others else ())
        axes = [batches if first < 0 else (first,) * 3, *(next(ranges) if size < 0 else (size,) * 3 for size in others)]
        return [tuple(axis[at] for axis in axes) for at in range(3)]

    def _open_sides(self) -> list[tuple[int, int, int]]:
        """Smallest, typical and largest of each open side, height before width, as the file's metadata has them."""
        entries = onnx.load(self.onnx_path, load_external_data=False).metadata_props
        try:
            sizes = {entry.key: entry.value for entry in entries}["cnx_deploy.image_size"]
            smallest, typical, largest = map(parse_image_size, sizes.split(":"))
        except (KeyError, ValueError, InputError) as error:
            raise InputError(
                f"{self.onnx_path.name} leaves more of its input open than the batch, and does not say from where to "
                "where. Export it with cnx-deploy export, or with a fixed image size."
            ) from error
        both = zip(*map(sides, (smallest, typical, largest)), strict=True)
        return [(low, side, high) for low, side, high in both if low != high]

    def config(self, target: str, *, allow_tf32: bool, batches: Sequence[tuple[int, int, int]] = ()) -> Any:
        """A builder configuration: target, explicit TF32, full layer information, one profile a batch range."""
        trt = self.backend.trt
        config = self.builder.create_builder_config()
        self.backend.select_target(config, target)
        (config.set_flag if allow_tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if self.libraries:
            config.plugins_to_serialize = list(self.libraries)
        dynamic = any(-1 in tuple(self.network.get_input(index).shape) for index in range(self.network.num_inputs))
        for sizes in batches if dynamic else ():
            profile = self.builder.create_optimization_profile()
            for index in range(self.network.num_inputs):
                tensor = self.network.get_input(index)
                profile.set_shape(tensor.name, *self._shapes(tensor.shape, sizes))
            if config.add_optimization_profile(profile) < 0:
                raise self.error(f"refused the batch range {':'.join(map(str, sizes))}")
        return config

    def serialise(self, config: Any, progress: Progress | None = None) -> bytes:
        """Build; `progress` is told the seconds so far twice a second."""
        with _ticking(progress, self.onnx_path.name):
            plan = self.builder.build_serialized_network(self.network, config)
        if plan is None:
            raise self.error("made no engine")
        if any(LAYERNORM_WARNING in text for _, text in self.log.messages):
            raise self.error("found a LayerNorm computed in FP16, which overflows")
        return bytes(plan)

    def range_warnings(self) -> tuple[str, ...]:
        """Log lines about values that FP16 cannot hold well."""
        lines = (
            line.strip()
            for severity, text in self.log.messages
            if severity in ("WARNING", "ERROR", "INTERNAL_ERROR")
            for line in text.splitlines()
        )
        return tuple(dict.fromkeys(line for line in lines if any(word in line.lower() for word in RANGE_WORDS)))

    def error(self, what: str) -> BuildError:
        """A BuildError with the log's last errors (or warnings), `NOTICES` left out."""
        wanted = [text for severity, text in self.log.messages if severity in ("ERROR", "INTERNAL_ERROR", "WARNING")]
        lines = [" ".join(text.split()) for text in wanted if not any(notice in text for notice in NOTICES)]
        tail = "\n  ".join(lines[-4:])
        name = f"{self.backend.name} {self.backend.version}"
        advice = "Look at the file with cnx-deploy inspect, or export it again."
        log = f" Its log:\n  {tail}" if tail else ""
        return BuildError(f"{name} {what} ({self.onnx_path.name}). {advice}{log}")


def type_census(network: Any) -> TypeCensus:
    """Layers of a parsed network by the type of their first output, and for FLOAT by kind of layer.

    Precision is read here and not from an option: with strong typing these are the types the engine computes in.
    """
    types: Counter[str] = Counter()
    float_layers: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.num_outputs == 0:
            continue
        kind = layer.get_output(0).dtype.name
        types[kind] += 1
        if kind == "FLOAT":
            float_layers[layer.type.name] += 1
    return TypeCensus(dict(sorted(types.items())), dict(sorted(float_layers.items())))


def half_share(network: Any, kept: Sequence[str] = ()) -> float:
    """Share of HALF and BF16 among the matrix products and convolutions of a parsed network: where the arithmetic is.

    Over all layers the share says little, for every FP32 island brings a dozen small layers. `kept` names modules that
    are FP32 on purpose; layers have their names before the dot or slash. 1 where nothing else is left.
    """
    trt_kinds = ("CONVOLUTION", "MATRIX_MULTIPLY")
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    meant = tuple(f"{name}{end}" for name in kept for end in "./")
    heavy = [
        layer.get_output(0).dtype.name
        for layer in layers
        if layer.type.name in trt_kinds and layer.name not in kept and not layer.name.startswith(meant)
    ]
    return sum(heavy.count(kind) for kind in ("HALF", "BF16")) / len(heavy) if heavy else float(bool(kept))


@contextlib.contextmanager
def _ticking(progress: Progress | None, what: str) -> Iterator[None]:
    if progress is None:
        yield
        return
    done = threading.Event()
    start = time.monotonic()

    def tick() -> None:
        while not done.wait(0.5):
            progress(f"{what}, {time.monotonic() - start:.0f} s", 0.0)

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
