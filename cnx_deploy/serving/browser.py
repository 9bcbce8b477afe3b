"""A folder that classifies pictures in a browser: an ONNX file, its class names and a page on onnxruntime-web.

The page makes the pixels that `predict` makes: `browser_page/pixels.js` is Pillow's resize, equal byte for byte to the
Pillow that is installed when the folder is written. Pictures stay in the browser; the page asks nothing of any other
place. It runs on one thread, so that any server of files will do.

onnxruntime-web comes from npm, in one version, by its hash; `runtime` takes a copy that is here already.
"""

import importlib.metadata
import json
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnx_deploy import __version__
from cnx_deploy.core.artifacts import is_engine, open_artifact
from cnx_deploy.core.errors import CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.files import sha256_of_file, whole_folder
from cnx_deploy.core.image_size import sides
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.model.recorded import recorded_outputs, recorded_task

__all__ = ["RUNTIME_FILES", "RUNTIME_VERSION", "Package", "PackageRequest", "write_package"]

PAGE = Path(__file__).with_name("browser_page")
PAGE_FILES = ("index.html", "page.js", "pixels.js")
MODEL, NOTICE = "model.json", "NOTICE.txt"
RUNTIME, RUNTIME_VERSION = "onnxruntime-web", "1.30.0"
RUNTIME_FILES = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
"""What the page needs of the package's folder `dist`, and the SHA-256 of each."""
NPM_SECONDS = 600
NPM_RETRIES = ("--fetch-retries=1", "--fetch-retry-mintimeout=1000")
"""Without a network npm itself tries three times, with waits of 10 and 60 seconds."""
LARGEST_FILE = 1 << 30
"""Bytes of the largest network: WebAssembly addresses four times as many, and the file is held twice while it loads."""
TASKS = ("classification", "multi-label")
SCORES = ("logits", "probabilities")
"""Outputs that the page can name classes by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageRequest:
    """What `cnx-deploy package browser` takes.

    `files`: one ONNX file of a classifier. `runtime`: the package onnxruntime-web, as a folder (its `dist`, or the one
    above) or as npm's archive; None fetches it with npm.
    """

    files: tuple[Path, ...]
    to: Path
    runtime: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if len(self.files) != 1:
            raise InputError(f"{len(self.files)} artifacts were given, and a page is of one network. Name one.")
        if self.runtime is not None:
            object.__setattr__(self, "runtime", Path(self.runtime))


@dataclass(frozen=True, slots=True)
class Package:
    """A folder that was written, its files, and what is to be known of it."""

    path: Path
    files: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as --json prints them."""
        return {"path": str(self.path), "files": list(self.files), "notes": list(self.notes)}

    def __str__(self) -> str:
        return (
            f"{self.path}: {', '.join(self.files)}\n"
            "Serve it with any server of files, such as python -m http.server --bind 127.0.0.1 --directory "
            f"{shlex.quote(str(self.path))}"
        )


def write_package(request: PackageRequest, note: Callable[[str], None]) -> Package:
    """Write the folder, whole or not at all.

    Raises:
        InputError: a network whose answers the page cannot show, or that onnxruntime-web does not run.
        MissingRequirementError: npm is not here, or fetches nothing.
        CorruptArtifactError: the runtime is not the pinned one.
        OutputExistsError: something is at the place.
    """
    artifact = open_artifact(request.files[0])
    model = _model(artifact)
    notes = tuple(_notes(artifact))
    for text in notes:
        note(text)
    size = artifact.size_bytes + 16_000_000
    with whole_folder(request.to, force=request.force, is_own=_is_own, needed_bytes=size) as folder:
        with _runtime(request.runtime, note) as dist:
            for name in RUNTIME_FILES:
                shutil.copyfile(dist / name, folder / name)
        for name in PAGE_FILES:
            shutil.copyfile(PAGE / name, folder / name)
        shutil.copyfile(artifact.path, folder / artifact.path.name)
        deploy = artifact.manifest.deploy
        foot = (
            f"{artifact.path.name}, {deploy.precision.upper()}, {deploy.size_text} px. Weights: "
            f"{artifact.manifest.model.weights.licence}. Pictures stay in this browser."
        )
        text = json.dumps({**model, "notes": [foot, *notes]}, indent=1, ensure_ascii=False)
        (folder / MODEL).write_text(text + "\n", encoding="utf-8")
        (folder / NOTICE).write_text(_notice(artifact), encoding="utf-8")
    return Package(request.to, (*PAGE_FILES, MODEL, artifact.path.name, *RUNTIME_FILES, NOTICE), notes)


def _model(artifact: Artifact) -> dict[str, Any]:
    """What the page has to know of the network. Raises InputError for one that it cannot show."""
    manifest, name = artifact.manifest, artifact.path.name
    record, made = manifest.model, manifest.model.preprocessing
    if is_engine(artifact) or manifest.kind != "onnx":
        raise InputError(f"{name} is an engine, and a browser runs ONNX files. Package the file it was built from.")
    outputs = {spec.name: spec for spec in recorded_outputs(artifact)}
    output = next((outputs[word] for word in SCORES if word in outputs), None)
    if record.task not in TASKS or output is None:
        raise InputError(
            f"{name} gives {', '.join(outputs)} of the task {record.task}, and the page names classes by "
            f"{' or '.join(SCORES)}. Export a classifier with one of them (--output)."
        )
    if made.in_chans not in (1, 3):
        raise InputError(f"{name} takes images of {made.in_chans} channels, and a page has colour or grey pictures.")
    if manifest.precision.dtype == "bfloat16" or manifest.deploy.precision == "fp8":
        raise InputError(
            f"{name} computes in {manifest.deploy.precision.upper()}, which onnxruntime-web does not. Export it in FP16"
            " or FP32."
        )
    if len(manifest.files) > 1 or artifact.size_bytes > LARGEST_FILE:
        raise InputError(
            f"{name} has {artifact.size_bytes / 1e6:,.0f} MB, more than a page can hold in WebAssembly's memory beside "
            "what it computes. Export a smaller variant, or in FP16."
        )
    if manifest.batch[0] > 1:
        raise InputError(
            f"{name} takes batches from {manifest.batch[0]}, and the page runs one picture. Export it with --batch 1."
        )
    thresholds = recorded_task(record).thresholds or (0.5,) * record.num_classes
    images = {
        "size": list(sides(made.image_size)), "channels": made.in_chans, "crop_ratio": made.crop_ratio,
        "crop_mode": made.crop_mode, "interpolation": made.interpolation, "mean": list(made.mean),
        "std": list(made.std), "fill": list(made.fill),
        "pillow": int(importlib.metadata.version("pillow").partition(".")[0]),
    }  # fmt: skip
    activation = output.activation if output.name == "logits" else None
    return {
        "title": manifest.stem, "file": name, "sha256": artifact.sha256, "images": images,
        "input": {"name": next(iter(manifest.facts.inputs)), "kind": manifest.deploy.input_kind},
        "output": {"name": output.name, "activation": activation},
        "class_names": None if record.class_names is None else list(record.class_names),
        "thresholds": list(thresholds) if record.task == "multi-label" else None,
    }  # fmt: skip


def _notes(artifact: Artifact) -> Iterator[str]:
    record = artifact.manifest.model
    if record.weights.origin == "random":
        yield f"The weights are random (seed {record.weights.reference}): answers mean nothing."
    if (assumed := record.preprocessing.assumption(record.origins)) is not None:
        yield assumed
    if artifact.manifest.deploy.precision == "int8":
        yield "WebAssembly rounds INT8 otherwise than a processor: probabilities are near those of predict, not equal."
    if record.preprocessing.white_level is not None:
        yield "A browser shows 8 bits of a picture: the recorded white level is not used."


@contextmanager
def _runtime(given: Path | None, note: Callable[[str], None]) -> Iterator[Path]:
    """The folder that has the files of onnxruntime-web, whose hashes are checked."""
    with tempfile.TemporaryDirectory() as place:
        temporary = Path(place)
        if given is None:
            note(f"npm fetches {RUNTIME} {RUNTIME_VERSION}")
        archive = _fetched(temporary) if given is None else given
        if archive.is_file():
            archive = _unpacked(archive, temporary / "unpacked")
        folders = (archive, archive / "dist", archive / RUNTIME / "dist", archive / "node_modules" / RUNTIME / "dist")
        dist = next((folder for folder in folders if (folder / next(iter(RUNTIME_FILES))).is_file()), None)
        if dist is None:
            raise InputError(
                f"{given} has no {next(iter(RUNTIME_FILES))}: expected the folder or the archive of {RUNTIME} "
                f"{RUNTIME_VERSION}. Make one with `npm pack {RUNTIME}@{RUNTIME_VERSION}`."
            )
        for name, expected in RUNTIME_FILES.items():
            if not (dist / name).is_file() or sha256_of_file(dist / name) != expected:
                raise CorruptArtifactError(
                    f"{dist / name} is not that of {RUNTIME} {RUNTIME_VERSION}, which the page was tested with. Make "
                    f"it with `npm pack {RUNTIME}@{RUNTIME_VERSION}`."
                )
        yield dist


def _fetched(folder: Path) -> Path:
    """The archive of the pinned package, fetched by npm. Nothing of the package is run."""
    advice = (
        f"On a machine that reaches npm's registry run `npm pack {RUNTIME}@{RUNTIME_VERSION}`, bring the archive here "
        "and give it with --runtime (runtime)."
    )
    npm = shutil.which("npm")
    if npm is None:
        raise MissingRequirementError(f"npm is not installed, which fetches {RUNTIME}. {advice}")
    command = [npm, "pack", "--ignore-scripts", "--prefer-offline", "--loglevel=error", *NPM_RETRIES]
    command.append(f"{RUNTIME}@{RUNTIME_VERSION}")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=NPM_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise MissingRequirementError(f"npm fetched nothing in {NPM_SECONDS} seconds. {advice}") from error
    made = list(folder.glob("*.tgz"))
    if done.returncode or not made:
        told = [line.removeprefix("npm error ") for line in done.stderr.splitlines()]
        reason = next((line for line in told if line.startswith("FetchError")), "; ".join(told[:2]))
        raise MissingRequirementError(f"npm could not fetch {RUNTIME} ({reason or 'no reason given'}). {advice}")
    return made[0]


def _unpacked(archive: Path, folder: Path) -> Path:
    """The files of the runtime from npm's archive; nothing else in it is written."""
    folder.mkdir()
    try:
        with tarfile.open(archive) as opened:
            for name in RUNTIME_FILES:
                content = opened.extractfile(f"package/dist/{name}")
                if content is not None:
                    (folder / name).write_bytes(content.read())
    except (tarfile.TarError, KeyError, OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{archive} is not npm's archive of {RUNTIME} ({error}). Make it with `npm pack "
            f"{RUNTIME}@{RUNTIME_VERSION}`."
        ) from error
    return folder


def _notice(artifact: Artifact) -> str:
    """Licences of what is in the folder."""
    return f"""{artifact.path.name}: weights under {artifact.manifest.model.weights.licence}.

index.html, page.js, pixels.js, model.json: written by cnx-deploy {__version__}, MIT licence.
pixels.js follows the resampling of Pillow (https://python-pillow.github.io), MIT-CMU licence: Copyright 1997-2011 by
Secret Labs AB, 1995-2011 by Fredrik Lundh and contributors, 2010 by Jeffrey A. Clark and contributors.

{", ".join(RUNTIME_FILES)}: {RUNTIME} {RUNTIME_VERSION}, Copyright (c) Microsoft Corporation, MIT licence.
Notices of what is built into it: https://github.com/microsoft/onnxruntime/blob/v{RUNTIME_VERSION}/ThirdPartyNotices.txt

The MIT licence: permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software,
and to permit persons to whom the Software is furnished to do so, subject to the following conditions: the above
copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.
THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def _is_own(path: Path) -> bool:
    """Whether a folder holds a page of this module."""
    names = {entry.name for entry in path.iterdir()}
    fixed = {*PAGE_FILES, MODEL, NOTICE, *RUNTIME_FILES}
    return fixed <= names and all(name.endswith(".onnx") for name in names - fixed)
