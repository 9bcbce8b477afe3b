"""The proof of a rescued file: the rewritten graph in FP32 by ONNX Runtime, the FP16 file by the emulator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from cnx_deploy.core.errors import (
    BuildError,
    CheckFailedError,
    InputError,
    ParityError,
)
from cnx_deploy.core.gates import GATES, Differences, Gate, OutputSpec, ParityResult
from cnx_deploy.core.manifest import (
    Compiled,
)
from cnx_deploy.core.system import cpu_count
from cnx_deploy.exporters.graph_checks import load_model
from cnx_deploy.exporters.rescue.conversion import Conversion, convert, prepared_model, save_model
from cnx_deploy.exporters.trt.compiling import measure_isolated
from cnx_deploy.runners.emulator.graph import Graph
from cnx_deploy.runners.ort_session import LOAD_ERRORS, STATE, open_session
from cnx_deploy.verification.parity import RunningDifferences
from cnx_deploy.verification.rescue_request import (
    Arrays,
    Note,
    as_float,
)

__all__ = ["Proof"]

REFERENCE = "the original in FP32"


class Proof:
    """The rescued file against the original, on the same inputs; files that only the proof needs lie in `folder`."""

    def __init__(self, source: Path, folder: Path, rescued: Path, batches: Sequence[Arrays], note: Note) -> None:
        self._folder, self.rescued, self._batches, self._note = folder, rescued, batches, note
        self._source = source
        model = load_model(source)
        self.is_half = any(
            value.dtype == ir.DataType.FLOAT16 for value in (*model.graph.inputs, *model.graph.initializers.values())
        )
        del model
        self.original = source
        if self.is_half:
            self.original = folder / "widened.onnx"
            save_model(prepared_model(source), self.original)
        self.expected = _outputs(self.original, batches)
        broken = {
            name for outputs in self.expected for name, array in outputs.items()
            if array.dtype.kind == "f" and not np.isfinite(array).all()
        }  # fmt: skip
        if broken:
            raise CheckFailedError(
                f"{source.name} itself gives NaN or infinity in {', '.join(sorted(broken))}, in FP32 on finite inputs: "
                "there is nothing to compare with. Look at its weights, or give other inputs with --inputs or --size. "
                "Nothing was written."
            )

    def twin(self) -> tuple[ParityResult, ...]:
        """The verdict over the rewritten graph in FP32. Raises ParityError where it fails."""
        if self.is_half:
            self._check_widened()
        path = self._folder / "twin.onnx"
        _written(self._source, path, half=ir.DataType.FLOAT)
        results = _verdicts(_outputs(path, self._batches), self.expected, GATES["fp32"], "FP32 twin", self._batches)
        _check_passed(results, f"The rewritten graph of {self._source.name} is another function than the original")
        return results

    def half(self) -> dict[str, Any]:
        """The fields of `Rescued` on FP16: verdicts, what the naive file gives, or why it was not run."""
        naive = self._folder / "naive.onnx"
        _written(self._source, naive, keeps_islands=False)
        try:
            outputs, _ = _emulated(self.rescued, self._batches, tuple(self.expected[0]))
        except InputError as error:
            return {"not_run": str(error).replace(f"{self.rescued.parent}/", "")}
        results = _verdicts(outputs, self.expected, GATES["fp16"], "emulator fp16", self._batches)
        _check_passed(results, f"The FP16 file of {self._source.name} differs from the original in the emulator")
        outputs, broken = _emulated(naive, self._batches, tuple(self.expected[0]))
        measured = _verdicts(outputs, self.expected, GATES["fp16"], "naive fp16", self._batches)
        worst = max(measured, key=lambda result: (not result.passed, result.differences.relative_l2_max))
        told = f"relative L2 {worst.differences.relative_l2_max:.1e}"
        if not worst.differences.all_finite:
            told = f"{worst.differences.nonfinite_count} values are NaN or infinite"
        elif not worst.passed:
            told = "; ".join(worst.failures)
        return {"fp16": results, "naive": f"{told}, first not finite in {broken}" if broken else told}

    def compiled(self, target: str, batch: int) -> dict[str, Compiled]:
        """Kernels and bytes of the original in FP32, of the naive FP16 file and of the rescued one.

        TensorRT-RTX may refuse the naive one, for a LayerNorm in FP16: then it is left out and `note` is told.
        """
        files = {"original": self.original, "naive": self._folder / "naive.onnx", "rescued": self.rescued}
        made = {}
        for name, path in files.items():
            self._note(f"Compiling the {name} graph for {target}")
            try:
                what = f"Compiling the {name} graph of {self._source.name}"
                compiled = measure_isolated(path, target, batch, what=what)
            except BuildError as error:
                if name != "naive":
                    raise
                self._note(f"The naive graph was not compiled: {str(error).splitlines()[0]}")
            else:
                made[name] = compiled
        return made

    def _check_widened(self) -> None:
        """Compare the FP32 form of a half file with the file itself: ONNX Runtime computes both in FP32 on a CPU."""
        types = {each.name: each.type for each in _session(self._source).get_inputs()}
        batches = [
            {
                name: array.astype(np.float16) if types[name] == "tensor(float16)" else array
                for name, array in batch.items()
            }
            for batch in self._batches
        ]
        given = [
            {name: as_float(array) for name, array in outputs.items()} for outputs in _outputs(self._source, batches)
        ]
        if all(np.isfinite(array).all() for outputs in given for array in outputs.values()):
            results = _verdicts(given, self.expected, GATES["fp16"], "the half file itself", batches)
            _check_passed(results, f"{self._source.name} in FP32 is another function than the file itself")


def _written(
    source: Path, path: Path, *, half: ir.DataType = ir.DataType.FLOAT16, keeps_islands: bool = True
) -> Conversion:
    model = prepared_model(source)
    conversion = convert(model, half, keeps_islands=keeps_islands)
    save_model(model, path)
    return conversion


def _session(path: Path) -> Any:
    return open_session(path, threads=cpu_count())


def _outputs(path: Path, batches: Sequence[Arrays]) -> list[Arrays]:
    """What ONNX Runtime gives for each batch, by output."""
    session = _session(path)
    names = [each.name for each in session.get_outputs()]
    try:
        return [dict(zip(names, session.run(names, batch), strict=True)) for batch in batches]
    except (*LOAD_ERRORS, STATE.InvalidArgument) as error:
        raise InputError(
            f"ONNX Runtime cannot run {path.name} on the inputs of the proof ({str(error).splitlines()[0]}). Give "
            "others with --inputs (inputs), or the sizes of open axes with --size (sizes)."
        ) from error


def _emulated(path: Path, batches: Sequence[Arrays], names: Sequence[str]) -> tuple[list[Arrays], str | None]:
    """What the emulator gives under these names, and the first operator whose result is not finite.

    Raises InputError for an operator that it does not know.
    """
    graph, found, broken = Graph(path), [], None
    for batch in batches:
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        with torch.inference_mode():
            evaluation = graph.evaluate(tensors)
        found.append([as_float(evaluation.tensors[name].numpy()) for name in graph.outputs])
        broken = broken or evaluation.first_nonfinite
    return [dict(zip(names, arrays, strict=True)) for arrays in found], broken


def _verdicts(
    candidate: Sequence[Arrays], reference: Sequence[Arrays], gate: Gate, name: str, batches: Sequence[Arrays]
) -> tuple[ParityResult, ...]:
    """Judge every output over all batches: tensors of floats by their values, labels by the share that is equal."""
    sizes = tuple(dict.fromkeys(len(next(iter(batch.values()))) for batch in batches))
    results = []
    for output in reference[0]:
        pairs = [(one[output], other[output]) for one, other in zip(candidate, reference, strict=True)]
        if pairs[0][1].dtype.kind == "f":
            running = RunningDifferences(OutputSpec(output, (), "value"))
            for pair in pairs:
                running.add(
                    *(torch.from_numpy(array.reshape(max(1, len(array)) if array.ndim else 1, -1)) for array in pair)
                )
            measured = running.result()
        else:
            equal = np.concatenate([(np.asarray(one) == other).flatten() for one, other in pairs])
            share = float(equal.mean())
            measured = Differences(len(equal), 0, 0.0, 0.0, 1.0, share, int((~equal).sum()), 0, None, 0.0)
        results.append(ParityResult(name, REFERENCE, gate, sizes, output, measured, gate.failures(measured)))
    return tuple(results)


def _check_passed(results: Sequence[ParityResult], what: str) -> None:
    failed = [f"{result.output}: {'; '.join(result.failures)}" for result in results if not result.passed]
    if failed:
        raise ParityError(f"{what}: {', '.join(failed)}. Nothing was written.")
