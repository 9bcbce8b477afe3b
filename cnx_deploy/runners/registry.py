"""Which runners there are, which of them can run an artifact here, and one way to open them.

A runner is one module that calls `register_runner`; commands and checks read the registry and know no runner by name.
This module loads neither torch nor a runtime: a built-in runner's module is imported when the runner is asked for.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnx_deploy.core.errors import CnxDeployError, InputError, MissingRequirementError
from cnx_deploy.core.system import Machine, this_machine

if TYPE_CHECKING:
    from cnx_deploy.core.deploy_spec import DeploySpec
    from cnx_deploy.core.manifest import Artifact, ArtifactKind
    from cnx_deploy.model.convnextv2 import ConvNeXtV2
    from cnx_deploy.runners.base import Runner

__all__ = [
    "RunnerEntry",
    "RunnerOptions",
    "default_runner",
    "find_runner",
    "open_network",
    "open_runner",
    "register_runner",
    "runner_names",
    "runners_for",
]

BUILT_IN = {
    "onnxruntime": "cnx_deploy.runners.onnxruntime",
    "onnxruntime-plain": "cnx_deploy.runners.onnxruntime",
    "openvino": "cnx_deploy.runners.openvino",
    "openvino-bf16": "cnx_deploy.runners.openvino",
    "fused": "cnx_deploy.runners.fused",
    "emulate-fp16": "cnx_deploy.runners.emulated",
    "emulate-bf16": "cnx_deploy.runners.emulated",
    "tensorrt": "cnx_deploy.runners.tensorrt",
}
"""Runner -> the module that registers it, in the order in which the first that can is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """How a runner is opened; each takes what concerns it. The defaults are for checks, which share the machine.

    `threads` None: all processors this process may use. `spin`, `thread_per_image`: see `onnxruntime.OrtRunner`.
    `cuda_graph`, `in_child_first`, `allow_engine_code`: see `tensorrt.TensorRTRunner`. `hashes_hold`: they were checked
    by this command.
    """

    device: str = "cpu"
    threads: int | None = None
    spin: bool = False
    thread_per_image: bool = False
    cuda_graph: bool = False
    in_child_first: bool = False
    allow_engine_code: bool = False
    hashes_hold: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerEntry:
    """One runner. `name` is the word of `--backend`; `kinds` are the artifacts it takes.

    `can_run` gives the error that says why it cannot run an artifact of these kinds on a machine, and the way out:
    InputError where another choice helps, MissingRequirementError where the machine lacks something; None where it can.
    `open` makes the runner of an artifact whose hashes hold. `is_default`: it is taken where no runner is named.
    `open_network` makes one of a network in PyTorch and its deployment, for checkpoints; None where it takes files
    alone.
    `is_slow`: seconds an image, so that checks take a few images unless they are asked for more.
    `widens_half`: it computes FP16 files in FP32, which proves the graph and not the precision.
    """

    name: str
    kinds: tuple["ArtifactKind", ...]
    can_run: Callable[["Artifact", Machine], CnxDeployError | None]
    open: Callable[["Artifact", RunnerOptions], "Runner"]
    is_default: bool = False
    is_slow: bool = False
    widens_half: bool = False
    open_network: Callable[["ConvNeXtV2", "DeploySpec", RunnerOptions], "Runner"] | None = None

    def reason_against(self, artifact: "Artifact", machine: Machine) -> CnxDeployError | None:
        """Why it cannot run the artifact here; None where it can."""
        kind = artifact.manifest.kind
        if kind not in self.kinds:
            return InputError(f"{artifact.path.name} is of kind {kind}; the runner {self.name} takes {self.kinds[0]}.")
        return self.can_run(artifact, machine)


_ENTRIES: dict[str, RunnerEntry] = {}


def register_runner(entry: RunnerEntry) -> None:
    """Add a runner, or replace the one of its name: from then on every command takes it."""
    _ENTRIES[entry.name] = entry


def runner_names(kind: "ArtifactKind | None" = None) -> tuple[str, ...]:
    """Every runner, or those that take artifacts of a kind, built-in ones first."""
    names = tuple(dict.fromkeys((*BUILT_IN, *_ENTRIES)))
    return names if kind is None else tuple(name for name in names if kind in find_runner(name).kinds)


def find_runner(name: str) -> RunnerEntry:
    """Return the runner called `name`; InputError lists the names otherwise."""
    if name not in _ENTRIES and name in BUILT_IN:
        importlib.import_module(BUILT_IN[name])
    if name not in _ENTRIES:
        raise InputError(f"No runner is called {name!r}. Choose one of: {', '.join(runner_names())}.")
    return _ENTRIES[name]


def runners_for(artifact: "Artifact") -> tuple[str, ...]:
    """The runners whose agreement with PyTorch proves most of an artifact: those of its precision, or its engine's."""
    return ("tensorrt",) if artifact.manifest.kind == "engine" else artifact.manifest.precision.proven_by


def default_runner(artifact: "Artifact", device: str = "cpu") -> RunnerEntry:
    """Return the first default runner that can run an artifact here; MissingRequirementError says why none can."""
    entries = [find_runner(name) for name in runner_names(artifact.manifest.kind)]
    reasons = []
    for entry in (entry for entry in entries if entry.is_default):
        if (reason := entry.reason_against(artifact, this_machine(device))) is None:
            return entry
        reasons.append(reason)
    raise MissingRequirementError(str(reasons[0]))


def open_network(model: "ConvNeXtV2", spec: "DeploySpec", name: str, options: RunnerOptions) -> "Runner":
    """Open the runner called `name` for a network in PyTorch; InputError where it takes files alone."""
    entry = find_runner(name)
    if entry.open_network is None:
        able = [other for other in runner_names() if find_runner(other).open_network is not None]
        raise InputError(
            f"The backend {name} runs exported files, and this is a checkpoint. Export it with cnx-deploy export, or "
            f"choose {' or '.join(able) or 'no backend'}."
        )
    return entry.open_network(model, spec, options)


def open_runner(artifact: "Artifact", name: str | None = None, options: RunnerOptions | None = None) -> "Runner":
    """Open a runner for a recorded artifact; `name` None takes the first default one that can run it.

    The artifact's hashes are checked unless `options.hashes_hold`. Raises CorruptArtifactError where a hash does not
    hold, InputError where the runner does not take this artifact, MissingRequirementError where this machine lacks
    what the artifact needs.
    """
    options = options or RunnerOptions()
    if not options.hashes_hold:
        from cnx_deploy.core.artifacts import open_artifact  # `verify --help` reads this module and needs click alone

        artifact = open_artifact(artifact.path)
    if name is None:
        return default_runner(artifact, options.device).open(artifact, options)
    entry = find_runner(name)
    if (reason := entry.reason_against(artifact, this_machine(options.device))) is not None:
        raise reason
    return entry.open(artifact, options)
