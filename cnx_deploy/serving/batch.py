"""Answers for millions of images as Parquet files, each image exactly once whatever is killed on the way.

The images are listed and cut into parts (`serving.batch_sources`), and a part becomes one file, which is put into place
whole under a name that the part determines. So the files are the bookkeeping: there is no second record that could say
something else. Who is killed leaves no file or a whole one, a part that is computed twice replaces its file by the same
rows, and the same command goes on with the parts that have none.

::

    OUT/request.json                what was asked for: model, images, options; written first
    OUT/rows/part-000000.parquet    rows of one part
    OUT/manifest.json               the same and the counts; written last, so that its presence means a complete output
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from filelock import FileLock, Timeout

from cnx_deploy import __version__
from cnx_deploy.core.deploy_spec import ANSWER_DEFAULTS
from cnx_deploy.core.errors import CheckFailedError, InputError, OutputExistsError
from cnx_deploy.core.files import make_folder, sha256_of_file, whole_file, write_text
from cnx_deploy.core.image_size import sides
from cnx_deploy.core.strict_json import bounded_content, strict_json
from cnx_deploy.core.system import cpu_count, package_version, tool_versions
from cnx_deploy.data import ImageBatch
from cnx_deploy.model.source_config import CONFIG, PROCESSOR, weights_in
from cnx_deploy.model.tasks.base import Outputs, Prediction
from cnx_deploy.serving.batch_sources import BatchSource, Part, PartImages, find_source, pyarrow
from cnx_deploy.verification.inspect import kind_of_file, recorded_artifact
from cnx_deploy.verification.predict import Model, open_predictor, outputs_of_pixels, predict_images

__all__ = ["BatchRequest", "BatchResult", "PartResult", "PartWriter", "check_request", "run_batch"]

Engine = Literal["local", "ray"]
Progress = Callable[[str, float], None]
REQUEST, MANIFEST, ROWS, LOCK = "request.json", "manifest.json", "rows", ".batch.lock"
IDENTITY, RESULT = "cnx_deploy.request", "cnx_deploy.part"
"""Entries in the metadata of a file of rows: the hash of its request, and its `PartResult`."""
NOTES = 20
"""Sentences about images that are kept; of millions each may have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """What `run_batch` is asked for.

    Args:
        model: a checkpoint, an ONNX file or an engine.
        images: folders, patterns or files, see `batch_sources.find_source`; so are `column`, `id_column`,
            `image_folder` and `part_size`.
        out: the folder to write.
        engine: "local" is this process; "ray" is Ray Data, on this machine or a cluster.
        top: classes named for each image; None is the task's own number.
        probabilities: a column with the probabilities of all classes.
        keep: outputs of the network to keep as columns, such as "embedding".
        batch_size: images run at once, within the range that the model takes. ONNX files on a CPU run each image alone.
        model_options: how the model is opened: `device`, `class_names` and whatever else `cnx_deploy.load` takes.
        address: of a Ray cluster; None starts Ray on this machine.
        actors: processes of Ray that each hold the network; None fills the processors or the GPUs.
        cpus_per_actor: processors of each, which are also its threads.
        gpus_per_actor: None is 1 for an engine and for the device cuda, else 0.
    """

    model: Path
    images: tuple[str, ...]
    out: Path
    engine: Engine = "local"
    top: int | None = None
    probabilities: bool = False
    keep: tuple[str, ...] = ()
    batch_size: int = 8
    part_size: int | None = None
    column: str | None = None
    id_column: str | None = None
    image_folder: Path | None = None
    model_options: Mapping[str, Any] = field(default_factory=dict)
    address: str | None = None
    actors: int | None = None
    cpus_per_actor: int = 1
    gpus_per_actor: float | None = None

    def __post_init__(self) -> None:
        if not self.images:
            raise InputError("There are no images: expected a folder, a pattern or files. Name them.")
        if self.engine not in ("local", "ray"):
            raise InputError(f"No engine is called {self.engine!r}. Choose one of: local, ray.")
        for name in ("batch_size", "part_size", "cpus_per_actor", "actors", "top"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is {value}: expected a number from 1. Correct it.")
        if self.gpus_per_actor is not None and not 0 <= self.gpus_per_actor < math.inf:
            raise InputError(f"gpus_per_actor is {self.gpus_per_actor}: expected a finite number from 0. Correct it.")
        of_ray = {"address": None, "actors": None, "cpus_per_actor": 1, "gpus_per_actor": None}
        if self.engine == "local" and (
            given := [name for name, usual in of_ray.items() if getattr(self, name) != usual]
        ):
            flags = ", ".join(f"--{name.replace('_', '-')} ({name})" for name in given)
            raise InputError(f"{flags} is of Ray. Leave it out, or add --engine ray (engine='ray').")

    @property
    def options(self) -> dict[str, Any]:
        """What the rows depend on beside the model and the images, as plain types; the engine is not among it."""
        words = {name: getattr(self, name) for name in ("top", "probabilities", "keep", "batch_size")}
        usual = {**ANSWER_DEFAULTS, "device": "cpu"}
        words |= {
            name: value for name, value in self.model_options.items()
            if name != "allow_engine_code" and value not in (None, ()) and value != usual.get(name)
        }  # fmt: skip
        plain: dict[str, Any] = json.loads(json.dumps(words, default=_of_file))
        return plain

    def open(self, threads: int) -> Model:
        """Open the model for this many threads."""
        return open_predictor(self.model, many=True, threads=threads, **self.model_options)


@dataclass(frozen=True, slots=True)
class PartResult:
    """A part that has its file: how many rows, how many with an error, the first of those, and what was noted."""

    number: int
    rows: int
    errors: int
    first_error: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What is in the folder, and what this run did for it.

    `rows` and `errors` are of the whole output; `done` images are this run's, in `seconds` without the
    `startup_seconds` before the first one could be read. `first_errors`: ids and reasons of some rows with an error.
    """

    out: Path
    rows: int
    errors: int
    parts: int
    done: int
    seconds: float
    startup_seconds: float
    engine: Engine
    model_sha256: str
    was_finished: bool = False
    first_errors: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def images_per_second(self) -> float | None:
        """Of this run, without its start; None where it had nothing to do."""
        return self.done / self.seconds if self.done and self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        values = dataclasses.asdict(self)
        values |= {"out": str(self.out), "images_per_second": self.images_per_second}
        return values

    def __str__(self) -> str:
        whole = f"{self.out}: {self.rows:,} rows in {self.parts:,} files, {self.errors:,} with an error."
        if self.was_finished:
            return f"{whole} It was finished before; nothing was left to do."
        rate = f"{self.images_per_second:,.1f} images/s" if self.images_per_second else "no image was left"
        start = f"after {self.startup_seconds:.1f} s to start"
        return f"{whole} {self.done:,} images now in {self.seconds:,.1f} s ({rate}), {start}."


class PartWriter:
    """An opened model that turns parts into files. One in each process that works.

    Raises InputError where the model does not give what is to be kept.
    """

    def __init__(self, request: BatchRequest, document: Mapping[str, Any], threads: int) -> None:
        self.request, self.threads, self.folder = request, threads, request.out / ROWS
        self.document, self.sha256 = document, str(document["model"]["sha256"])
        if (there := read_json(request.out / REQUEST)) != document:
            what = "another request" if there is not None else "no request"
            raise InputError(
                f"{request.out} holds {what} where this process runs: expected one folder that every machine of the "
                "cluster sees under the same path. Put model, images and OUT on a shared file system."
            )
        self.model = request.open(threads)
        self.schema = self._schema()

    def close(self) -> None:
        """Free the model."""
        self.model.__exit__(None, None, None)

    def write(self, part: Part) -> PartResult:
        """Make the file of a part; one that is there already is taken as it is."""
        if (ready := finished_part(self.request.out, part, self.document)) is not None:
            return ready
        images = PartImages.of(part, self.threads)
        if len(images) != part.count:
            raise InputError(f"{part.place} has changed since it was listed. Begin again in another folder.")
        rows = list(self._rows(images, part.first))
        errors = [(row["id"], row["error"]) for row in rows if row["error"] is not None]
        arrow = pyarrow()
        notes = tuple(map(_utf8, (*self.model.notes, *images.observed())))
        result = PartResult(part.number, len(rows), len(errors), errors[0] if errors else None, notes)
        facts = {IDENTITY: identity(self.document), RESULT: json.dumps(dataclasses.asdict(result))}
        table = arrow.Table.from_pylist(rows, schema=self.schema.with_metadata(facts))
        with whole_file(self.folder / part.file_name) as temporary:
            arrow.parquet.write_table(table, temporary, compression="zstd")
        return result

    def _schema(self) -> Any:
        arrow, task = pyarrow(), self.model.task
        columns = {"index": arrow.int64(), "id": arrow.string(), "error": arrow.string()}
        told = {field.name for field in dataclasses.fields(task.prediction)}
        if "scores" in told:
            columns |= {"top_classes": arrow.list_(arrow.int64()), "top_names": arrow.list_(arrow.string())}
            columns["top_probabilities"] = arrow.list_(arrow.float64())
            columns |= {"more": arrow.int64()} if "more" in told else {}
        else:
            columns["answer"] = arrow.string()
        columns["model_sha256"] = arrow.string()
        fields = [arrow.field(name, kind) for name, kind in columns.items()]
        if self.request.keep or self.request.probabilities:  # what they are is told by a first image
            preprocessing = self.model.preprocessing
            black = torch.zeros(1, *sides(preprocessing.image_size), preprocessing.in_chans, dtype=torch.uint8)
            outputs = outputs_of_pixels(self.model, black, "a black image")
            for name, output in _kept(self.model, outputs, self.request).items():
                kind = arrow.list_(arrow.from_numpy_dtype(output.numpy().dtype))
                fields.append(arrow.field(name, kind, metadata={"shape": "x".join(map(str, output.shape[1:]))}))
        return arrow.schema(fields)

    def _rows(self, images: PartImages, first: int) -> Iterator[dict[str, Any]]:
        for index, (answer, values) in enumerate(_answers(self.model, images, self.request)):
            row: dict[str, Any] = {
                "index": first + index,
                "id": _utf8(images.name(index)),
                "error": answer.error and _utf8(answer.error),
            }
            row["model_sha256"] = self.sha256
            # An image that could not be read has no values; an answer may have a reservation and be one.
            yield row | (_columns(answer) | values if values is not None else {})


def run_batch(
    request: BatchRequest,
    note: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda text, share: None,
) -> BatchResult:
    """Answer for all images, or for those that an earlier run of the same request has left.

    Args:
        request: what is asked for.
        note: told what was listed, what is there already, and what the images have shown.
        progress: told a text and the share that is done.

    Raises:
        OutputExistsError: the folder holds something else, or rows of another model, other images or other options.
        MissingRequirementError: pyarrow or Ray is missing, or the cluster has too few processors.
        InputError: there are no images, the model does not fit, or another run is writing to the folder.
    """
    pyarrow()
    run_parts = _run_local
    if request.engine == "ray":
        from cnx_deploy.serving.batch_ray import check_ray
        from cnx_deploy.serving.batch_ray import run_on_ray as run_parts

        check_ray(is_here=request.address is None)
    source = find_source(
        request.images, part_size=request.part_size, batch_size=request.batch_size, column=request.column,
        id_column=request.id_column, image_folder=request.image_folder,
    )  # fmt: skip
    if source.kind == "parquet" and any(
        request.out.resolve().is_relative_to(Path(word).resolve()) for word in request.images
    ):
        raise InputError(
            f"{request.out} is inside the folder of images, of which its own Parquet files would be the next time. "
            "Choose another --to (out)."
        )
    note(f"{source}, in {len(source.parts):,} parts.")
    for text in source.notes:
        note(f"Note: {text}")
    document = _document(request, source)
    check_request(request.out, document, source)
    with _locked(request.out):
        check_request(request.out, document, source)  # again: another run may have ended since
        results = _ready_parts(request.out, source, document, note)
        left = [part for part in source.parts if part.number not in results]
        was_finished = not left and (request.out / MANIFEST).is_file()
        before = sum(result.rows for result in results.values())
        if before and left:
            note(f"{before:,} of {source.count:,} images have their rows already; the others follow.")
        clock = _Clock(source.count, before, progress)
        if left:
            (request.out / MANIFEST).unlink(missing_ok=True)
            write_text(request.out / REQUEST, _text(document))
            for part_result in run_parts(request, document, left, clock.start):
                results[part_result.number] = part_result
                clock.add(part_result.rows)
        result = _result(request, source, document, results, clock, was_finished=was_finished)
        if not was_finished:
            _check_complete(request.out, source, document)
            facts = {name: value for name, value in result.to_dict().items() if name not in ("out", "was_finished")}
            tools = {**tool_versions(), "pyarrow": pyarrow().__version__, "ray": package_version("ray") or "none"}
            write_text(request.out / MANIFEST, _text({**document, "result": facts, "tools": tools}))
        _tidy(request.out)
    for text in result.notes:
        note(f"Note: {text}")
    return result


def check_request(out: Path, document: Mapping[str, Any], source: BatchSource) -> None:
    """Raise OutputExistsError where a folder holds something else than an output of this request."""
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out} is a file, where a folder was expected. Choose another --to (out).")
    there = read_json(out / REQUEST)
    held = [path.name for path in sorted(out.iterdir()) if not path.name.startswith(".")] if out.is_dir() else []
    if held == [ROWS] and not any((out / ROWS).iterdir()):  # of a run that was killed before its request was written
        held = []
    if there is None:
        if held:
            raise OutputExistsError(
                f"{out} is not empty and has no {REQUEST} of a batch: {', '.join(held[:3])}. Choose another --to (out)."
            )
        return
    if not any((out / ROWS).glob("part-*")):
        return  # nothing was begun with it
    if not {"model", "source", "options"} <= there.keys():
        raise OutputExistsError(f"{out / REQUEST} is not of a batch of this version. Choose another --to (out).")
    model, asked = there["model"], document["model"]
    other = "Choose another --to (out), or give what it was begun with."
    if model["sha256"] != asked["sha256"]:
        raise OutputExistsError(
            f"{out} has answers of {model['name']}, sha256 {model['sha256'][:12]}…; this model is {asked['name']}, "
            f"sha256 {asked['sha256'][:12]}…. {other}"
        )
    if model["record_sha256"] != asked["record_sha256"]:
        raise OutputExistsError(
            f"{out} has answers of {model['name']} under another manifest: classes or preprocessing differ. {other}"
        )
    if there["source"]["sha256"] != document["source"]["sha256"]:
        begun = there["source"]
        raise OutputExistsError(
            f"{out} was begun on {begun['count']:,} images of {begun['description']}, and these are not the same: "
            f"{source}. {other}"
        )
    was, now = ({**one["options"], "part_size": one["source"]["part_size"]} for one in (there, document))
    if changed := [name for name in {**was, **now} if was.get(name) != now.get(name)]:
        said = ", ".join(f"{name} {_shown(was.get(name))} and not {_shown(now.get(name))}" for name in changed)
        raise OutputExistsError(f"{out} was begun with {said}. {other}")
    if there["format"] != document["format"]:
        raise OutputExistsError(f"{out} was begun by cnx-deploy {there['cnx_deploy']}, in another form. {other}")


def finished_part(out: Path, part: Part, document: Mapping[str, Any]) -> PartResult | None:
    """What the file of a part says of itself; None where it is not there or cannot be read to its end."""
    path, arrow = out / ROWS / part.file_name, pyarrow()
    try:
        metadata = arrow.parquet.read_metadata(path)
    except (arrow.ArrowException, OSError):
        return None
    facts = metadata.metadata or {}
    if facts.get(IDENTITY.encode()) != identity(document).encode() or metadata.num_rows != part.count:
        return None
    return msgspec.json.decode(facts[RESULT.encode()], type=PartResult)


def identity(document: Mapping[str, Any]) -> str:
    """The hash of a request, by which a file of rows names it."""
    return sha256(
        _text({name: document[name] for name in ("model", "source", "options", "format")}).encode()
    ).hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """A document of this output; None where there is none or it is no JSON object."""
    try:
        content = strict_json(bounded_content(path))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


# --- the run ----------------------------------------------------------------------------------------------------------


class _Clock:
    """Counts images and says how fast they come and when the rest will be done."""

    def __init__(self, total: int, before: int, progress: Progress) -> None:
        self.total, self.before, self.done, self._progress = total, before, 0, progress
        self.begun = self.first = time.perf_counter()

    def start(self, seconds_ago: float = 0.0) -> None:
        """The first image is read, or was some seconds ago."""
        self.first = time.perf_counter() - seconds_ago

    def add(self, count: int) -> None:
        """Images are done."""
        self.done += count
        there = self.before + self.done
        rate = self.done / max(self.seconds, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((self.total - there) / rate))
        days = int((self.total - there) / rate // 86400)
        left = f"{days} d {left}" if days else left
        self._progress(f"{there:,} of {self.total:,} images, {rate:,.1f}/s, {left} left", there / self.total)

    @property
    def seconds(self) -> float:
        """Since the first image could be read."""
        return time.perf_counter() - self.first


def _run_local(
    request: BatchRequest, document: Mapping[str, Any], parts: Sequence[Part], started: Callable[[float], None]
) -> Iterator[PartResult]:
    writer = PartWriter(request, document, cpu_count())
    try:
        started(0.0)
        yield from map(writer.write, parts)
    finally:
        writer.close()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Make the folders and keep other runs out; the system frees the lock of a process that died."""
    make_folder(out / ROWS, "Choose another --to (out).")
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"Another run is writing to {out}. Wait for it, or choose another --to (out).") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _ready_parts(
    out: Path, source: BatchSource, document: Mapping[str, Any], note: Callable[[str], None]
) -> dict[int, PartResult]:
    """The parts that have their files. Raises OutputExistsError for a file that no part of these has."""
    names = {part.file_name: part for part in source.parts}
    found: dict[int, PartResult] = {}
    for path in sorted((out / ROWS).iterdir()):
        if path.name.startswith("."):  # what a killed process left; it is removed with the part's next file
            continue
        if path.name not in names:
            raise OutputExistsError(f"{path} is no file of this output, and readers would take it for one. Remove it.")
        result = finished_part(out, names[path.name], document)
        if result is None:
            note(f"{path} cannot be read as a part of this output; it is made again.")
        else:
            found[result.number] = result
    return found


def _tidy(out: Path) -> None:
    """Remove what killed processes have left beside whole files: locks and temporary folders of `core.files`."""
    for path in (*out.glob(f".{REQUEST}.*"), *out.glob(f".{MANIFEST}.*"), *(out / ROWS).glob(".part-*")):
        if path.suffix == ".tmp" and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix == ".lock":
            path.unlink(missing_ok=True)


def _check_complete(out: Path, source: BatchSource, document: Mapping[str, Any]) -> None:
    """Raise CheckFailedError unless every part has its file, and every index from 0 is there once."""
    arrow = pyarrow()
    for part in source.parts:
        if finished_part(out, part, document) is None:
            raise CheckFailedError(f"{out / ROWS / part.file_name} is missing or damaged. Run the same command again.")
        metadata = arrow.parquet.read_metadata(out / ROWS / part.file_name)
        limits = [metadata.row_group(at).column(0).statistics for at in range(metadata.num_row_groups)]
        held = (min(each.min for each in limits), max(each.max for each in limits))
        if held != (part.first, part.first + part.count - 1):
            raise CheckFailedError(f"{part.file_name} has rows {held[0]} to {held[1]}. Remove it and run again.")


def _result(
    request: BatchRequest, source: BatchSource, document: Mapping[str, Any], results: Mapping[int, PartResult],
    clock: _Clock, *, was_finished: bool,
) -> BatchResult:  # fmt: skip
    rows = sum(result.rows for result in results.values())
    ordered = [results[number] for number in sorted(results)]
    return BatchResult(
        out=request.out, rows=rows, errors=sum(result.errors for result in ordered), parts=len(results),
        done=clock.done, seconds=clock.seconds if clock.done else 0.0, startup_seconds=clock.first - clock.begun,
        engine=request.engine, model_sha256=document["model"]["sha256"], was_finished=was_finished,
        first_errors=tuple(result.first_error for result in ordered if result.first_error)[:NOTES],
        notes=tuple(dict.fromkeys(text for result in ordered for text in result.notes))[:NOTES],
    )  # fmt: skip


# --- what is asked for ------------------------------------------------------------------------------------------------


def _document(request: BatchRequest, source: BatchSource) -> dict[str, Any]:
    """The request as it is written down; two that are equal have the same rows."""
    path = weights_in(request.model) if request.model.is_dir() else request.model
    kind = kind_of_file(path)  # and whether it can be read
    artifact = recorded_artifact(path)
    if artifact is not None:
        hashes = [record.sha256 for record in artifact.manifest.files]
        record = json.dumps(msgspec.to_builtins(artifact.manifest.model), sort_keys=True)
    else:
        hashes = [sha256_of_file(file) for file in (path, *map(Path, request.model_options.get("soup", ())))]
        # What lies beside weights says how images are made and what classes are called.
        beside = [path.with_name(name) for name in (CONFIG, PROCESSOR)]
        record = " ".join(_of_file(file) for file in beside if file.is_file())
    whole = hashes[0] if len(hashes) == 1 else sha256(" ".join(hashes).encode()).hexdigest()
    return {
        "cnx_deploy": __version__,
        "format": 1,
        "model": {
            "name": _utf8(path.name), "kind": kind, "sha256": whole,
            "record_sha256": sha256(record.encode()).hexdigest(),
        },
        "source": {
            "kind": source.kind, "description": _utf8(source.description), "count": source.count,
            "sha256": source.sha256, "part_size": source.part_size, "parts": len(source.parts),
        },
        "options": request.options,
    }  # fmt: skip


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _of_file(path: Path) -> str:
    """An option that is a file, by what is in it."""
    return f"{path.name}, sha256 {sha256_of_file(path)}"


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)


# --- rows -------------------------------------------------------------------------------------------------------------


def _columns(answer: Any) -> dict[str, Any]:
    """What an answer has beside id and error: scores of classes, or whatever the task says, as JSON."""
    if not hasattr(answer, "scores"):
        plain = {name: value for name, value in answer.to_dict().items() if name not in ("path", "error")}
        return {"answer": json.dumps(plain, ensure_ascii=False)}
    columns = {
        "top_classes": [score.index for score in answer.scores],
        "top_names": [score.name for score in answer.scores],
        "top_probabilities": [score.probability for score in answer.scores],
    }
    return columns | ({"more": answer.more} if hasattr(answer, "more") else {})


def _answers(model: Model, images: PartImages, request: BatchRequest) -> Iterator[tuple[Prediction, Any]]:
    """The prediction for each image, and the columns of its outputs; None for an image that has none."""
    try:
        yield from _predicted(model, images, request)
    except CheckFailedError:  # outputs that are not finite: told of the image that has them, when each runs alone
        for row in images.rows:
            alone = PartImages([row], 1)
            alone.seen = images.seen
            try:
                yield from _predicted(model, alone, request)
            except CheckFailedError as error:
                yield model.task.prediction(path=alone.name(0), error=str(error)), None


def _predicted(model: Model, images: PartImages, request: BatchRequest) -> list[tuple[Prediction, Any]]:
    columns: dict[int, dict[str, Any]] = {}

    def keep(batch: ImageBatch, outputs: Outputs) -> None:
        values = {name: output.flatten(1).numpy() for name, output in _kept(model, outputs, request).items()}
        for at, index in enumerate(batch.indices):
            columns[index] = {name: rows[at] for name, rows in values.items()}

    answers = predict_images(model, images, top=request.top, batch_size=request.batch_size, each=keep)
    return [(answer, columns.get(index)) for index, answer in enumerate(answers)]


def _utf8(text: str) -> str:
    """A text as Parquet and JSON take it: what is no UTF-8 in the name of a file becomes an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _kept(model: Model, outputs: Outputs, request: BatchRequest) -> Outputs:
    """The outputs (n, ...) that become columns. Raises InputError for one that the model does not give."""
    if unknown := [name for name in request.keep if name not in outputs]:
        raise InputError(
            f"{request.model} gives {', '.join(outputs)}, and not {', '.join(unknown)}. Leave it out of --keep (keep), "
            "or export with --output."
        )
    kept = {name: outputs[name] for name in request.keep}
    if not request.probabilities:
        return kept
    if "probabilities" in outputs:
        return {"probabilities": outputs["probabilities"], **kept}
    activation = getattr(model.task, "activation", None)
    if "logits" not in outputs or activation is None:
        raise InputError(
            f"{request.model} gives {', '.join(outputs)}, which have no probability of each class. Leave "
            "--probabilities (probabilities) out."
        )
    scores = outputs["logits"].double()
    return {"probabilities": (scores.softmax(1) if activation == "softmax" else scores.sigmoid()).float(), **kept}
