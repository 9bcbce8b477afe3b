"""`package browser`: its page in a headless Chromium names the classes of `predict`; what cannot run is refused.

Run with `pytest -m slow tests/serving/test_browser.py`. It needs Chromium (scripts/browser), and npm with its registry,
or the archive of `npm pack onnxruntime-web@1.30.0` under ONNXRUNTIME_WEB.
"""

import functools
import http.server
import json
import os
import queue
import shlex
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cnx_deploy as cnx
from cnx_deploy.core.errors import CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.image_size import CROP_MODES, INTERPOLATIONS, sides
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data.pixels import cropped_pixels
from cnx_deploy.serving import browser
from cnx_deploy.serving.browser import RUNTIME_FILES
from tests.conftest import Command
from tests.support.artifacts import altered_artifact
from tests.support.chromium import BROWSER, FLAGS, NO_NAMES
from tests.support.pictures import smooth_pictures

NODE = shutil.which("node")
NO_CHROMIUM = "no Chromium is installed: scripts/browser installs Debian's"
NAMES = tuple(f"Klasse {index} <Küche>" for index in range(10))
DROP = """<!doctype html><meta charset="utf-8"><iframe src="index.html" style="width: 800px; height: 900px"></iframe>
<script>
const results = [], frame = document.querySelector("iframe"), pause = () => new Promise(done => setTimeout(done, 50));
addEventListener("load", async () => {
  const {contentWindow: page, contentDocument: root} = frame;
  const said = () => root.querySelector("[role=status]").textContent;
  while (said().startsWith("Loading")) await pause();
  results.push(said());
  for (const name of await (await fetch("files.json")).json()) {
    const file = new page.File([await (await fetch("drop/" + name)).blob()], name), dropped = new page.DataTransfer();
    dropped.items.add(file);
    page.dispatchEvent(new page.DragEvent("drop", {dataTransfer: dropped, cancelable: true}));
    while (said().startsWith("Looking")) await pause();
    const cells = [...root.querySelectorAll("tr")].map(row => [...row.cells]);
    const rows = cells.map(([name, share]) => [name.textContent, share.textContent]);
    const exact = cells.map(row => row[2].querySelector("progress").value);
    results.push({name, said: said(), rows, exact});
  }
  await fetch("results", {method: "POST", body: JSON.stringify(results)});
});
</script>"""


class Served(http.server.SimpleHTTPRequestHandler):
    """A plain server of files, which takes what the harness found."""

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self.server.found.put(json.loads(content))  # type: ignore[attr-defined]

    def log_message(self, *words: Any) -> None:
        """Say nothing."""


def dropped(folder: Path, files: list[Path], work: Path) -> tuple[str, list[dict[str, Any]]]:
    """Drop files onto the page in Chromium: what it said when it was ready, and what it shows of each file."""
    (folder / "drop").mkdir()
    for file in files:
        shutil.copy(file, folder / "drop")
    (folder / "files.json").write_text(json.dumps([file.name for file in files]), encoding="utf-8")
    (folder / "harness.html").write_text(DROP, encoding="utf-8")
    handler = functools.partial(Served, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.found = queue.Queue()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/harness.html"
        words = [
            f"--user-data-dir={work / 'profile'}",
            f"{NO_NAMES}, EXCLUDE 127.0.0.1",
            "--remote-debugging-port=0",
            address,
        ]
        log = (work / "log").open("w", encoding="utf-8")
        process = subprocess.Popen([str(BROWSER), *FLAGS, *words], stdout=log, stderr=log)
        try:
            ready, *shown = server.found.get(timeout=120)  # type: ignore[attr-defined]
        except queue.Empty:
            raise AssertionError((work / "log").read_text(encoding="utf-8")[-3000:]) from None
        finally:
            process.terminate()
            process.wait(30)
            server.shutdown()
            log.close()
    complaints = [line for line in (work / "log").read_text("utf-8").splitlines() if ":CONSOLE" in line]
    assert complaints == []
    return ready, shown


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """npm's archive of onnxruntime-web: a given one, or fetched."""
    if (given := os.environ.get("ONNXRUNTIME_WEB")) is not None:
        return Path(given)
    try:
        return browser._fetched(tmp_path_factory.mktemp("npm"))
    except MissingRequirementError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photos and drawings in what browsers read, one turned by its EXIF, one no picture at all."""
    folder = tmp_path_factory.mktemp("pictures")
    import skimage.data

    photo, cat = Image.fromarray(skimage.data.astronaut()), Image.fromarray(skimage.data.chelsea())
    (smooth,) = smooth_pictures(((201, 301),))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "photo.png")
    cat.save(folder / "cat.jpg", quality=92)
    cat.save(folder / "turned.jpg", quality=92, exif=exif)
    smooth.save(folder / "tall.webp", lossless=True)
    photo.convert("L").save(folder / "grey.png")
    photo.quantize(64).save(folder / "palette.png")
    cat.save(folder / "cat.bmp")
    (folder / "words.txt").write_text("These are words.", encoding="utf-8")
    (folder / "broken.jpg").write_bytes((folder / "cat.jpg").read_bytes()[:400])
    return sorted(folder.iterdir())


EXPORTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "probabilities of bytes": {"precision": "fp32", "input_kind": "uint8", "outputs": ("probabilities", "embedding")},
    "labels": {"precision": "fp32", "task": "multi-label", "crop_mode": "border", "crop_ratio": 1.0},
    "grey": {"precision": "fp32", "in_chans": 1, "interpolation": "lanczos"},
}


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize("kind", EXPORTS)
def test_the_five_classes_of_a_dropped_picture_are_those_of_predict(
    kind: str, runtime: Path, pictures: list[Path], tmp_path: Path
) -> None:
    words = {"image_size": 96, "class_names": NAMES, "num_classes": 10, **EXPORTS[kind]}
    artifact = cnx.export("tiny-test", output_dir=tmp_path / "export", no_verify=True, **words)
    folder = cnx.package(artifact, "browser", to=tmp_path / "page", runtime=runtime).path
    ready, shown = dropped(folder, pictures, tmp_path)
    assert ready == "Ready."
    assert [row["name"] for row in shown] == [path.name for path in pictures]
    for path, row in zip(pictures, shown, strict=True):
        if path.name in ("words.txt", "broken.jpg"):
            assert row["said"] == (
                f"{path.name} cannot be read as a picture. Drop a JPEG, PNG, WebP, GIF, BMP or AVIF file."
            )
            assert row["rows"] == []
            continue
        expected = cnx.predict(artifact, path).scores
        assert [name for name, _ in row["rows"]] == [score.name for score in expected], path.name
        assert [share for _, share in row["rows"]] == [f"{value:.2%}" for value in row["exact"]]
        # Casts of an FP16 file stand at other places in WebAssembly.
        limit = 5e-4 if kind == "fp16" else 2e-6
        assert row["exact"] == pytest.approx([score.probability for score in expected], abs=limit), path.name
        assert "transparent" not in row["said"]


@pytest.mark.skipif(NODE is None, reason="no node is installed to run the page's JavaScript")
def test_the_pages_pixels_are_pillows_byte_for_byte(tmp_path: Path) -> None:
    random, cases, expected = np.random.default_rng(0), list[dict[str, Any]](), list[np.ndarray]()
    sizes = [(64, 64), (73, 50), (37, 91), (150, 20), (24, 24), (20, 133)]
    for interpolation in INTERPOLATIONS:
        for number, mode in enumerate(CROP_MODES * 2):
            width, height = sizes[int(random.integers(len(sizes)))]
            channels = (3, 1)[number % 2]
            ratio = 1.0 if mode == "corner" else (0.875, 0.95)[number % 2]
            made = Preprocessing((32, 64, (48, 32))[number % 3], ratio, interpolation, crop_mode=mode)
            made = made.for_channels(channels)
            rgba = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
            picture = Image.fromarray(rgba).convert("RGB").convert("RGB" if channels == 3 else "L")
            expected.append(cropped_pixels((picture,), made))
            images = {
                "size": sides(made.image_size),
                "crop_ratio": made.crop_ratio,
                "crop_mode": mode,
                "fill": made.fill,
            }
            images |= {"interpolation": interpolation, "channels": channels}
            images["pillow"] = int(Image.__version__.partition(".")[0])
            cases.append({"rgba": rgba.ravel().tolist(), "width": width, "height": height, "images": images})
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    shutil.copy(browser.PAGE / "pixels.js", tmp_path / "pixels.mjs")
    (tmp_path / "run.mjs").write_text(
        'import {pixels} from "./pixels.mjs"; import fs from "node:fs";\n'
        'const cases = JSON.parse(fs.readFileSync("cases.json"));\n'
        "const made = cases.map(({rgba, width, height, images}) => Array.from(pixels(rgba, width, height, images)));\n"
        'fs.writeFileSync("made.json", JSON.stringify(made));\n',
        encoding="utf-8",
    )
    subprocess.run([str(NODE), "run.mjs"], cwd=tmp_path, check=True, timeout=120)
    for case, wanted, made in zip(cases, expected, json.loads((tmp_path / "made.json").read_text()), strict=True):
        assert made == wanted.ravel().tolist(), case["images"]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in the place of onnxruntime-web's, with hashes to match, for what needs no runtime."""
    folder = tmp_path / "onnxruntime-web" / "dist"
    folder.mkdir(parents=True)
    for name in RUNTIME_FILES:
        (folder / name).write_text(name, encoding="utf-8")
        monkeypatch.setitem(RUNTIME_FILES, name, browser.sha256_of_file(folder / name))
    return folder.parent


def test_the_folder_has_the_files_the_names_and_the_licences(
    tiny_onnx_fp32: cnx.Artifact, pretended: Path, tmp_path: Path, cnx: Command
) -> None:
    folder = tmp_path / "a page"
    code, out, err = cnx("package", "browser", tiny_onnx_fp32.path, "--to", folder, "--runtime", pretended)
    command = out[out.index("python -m http.server") :]
    assert (code, shlex.split(command)[-1], "weights are random" in err) == (0, str(folder), True)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["index.html", "page.js", "pixels.js", "model.json", "NOTICE.txt", tiny_onnx_fp32.path.name, *RUNTIME_FILES]
    )
    model = json.loads((folder / "model.json").read_text("utf-8"))
    assert (model["file"], model["sha256"]) == (tiny_onnx_fp32.path.name, tiny_onnx_fp32.sha256)
    assert (folder / model["file"]).read_bytes() == tiny_onnx_fp32.path.read_bytes()
    assert (model["output"], model["thresholds"]) == ({"name": "logits", "activation": "softmax"}, None)
    assert "Microsoft Corporation, MIT licence" in (folder / "NOTICE.txt").read_text("utf-8")
    for name in ("index.html", "page.js", "pixels.js"):  # nothing from elsewhere
        assert "https:" not in (folder / name).read_text("utf-8")
    code, _, err = cnx("package", "browser", tiny_onnx_fp32.path, "--to", folder, "--runtime", pretended)
    assert (code, "--force" in err) == (2, True)
    assert cnx("package", "browser", tiny_onnx_fp32.path, "--to", folder, "--runtime", pretended, "--force")[0] == 0


def test_another_runtime_is_refused_and_one_that_cannot_be_fetched_says_how_to_bring_it(
    tiny_onnx_fp32: cnx.Artifact, pretended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "own.tgz"
    with tarfile.open(archive, "w:gz") as written:
        written.add(pretended, "package")
    assert cnx.package(tiny_onnx_fp32, "browser", to=tmp_path / "page", runtime=str(archive)).files
    (tmp_path / "cut.tgz").write_bytes(archive.read_bytes()[:-20])
    (pretended / "dist" / next(iter(RUNTIME_FILES))).write_text("other", encoding="utf-8")
    to = tmp_path / "other"
    with pytest.raises(CorruptArtifactError, match=r"not that of onnxruntime-web 1\.30\.0"):
        cnx.package(tiny_onnx_fp32, "browser", to=to, runtime=pretended)
    for given, said in (
        (tmp_path / "page" / "none", "expected the folder or the archive"),
        (tiny_onnx_fp32.path, "not npm's archive"),
        (tmp_path / "cut.tgz", "not npm's archive"),
    ):
        with pytest.raises(InputError, match=said):
            cnx.package(tiny_onnx_fp32, "browser", to=to, runtime=given)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingRequirementError, match=r"npm is not installed.*npm pack onnxruntime-web@1\.30\.0"):
        cnx.package(tiny_onnx_fp32, "browser", to=to)
    # npm tries three times by itself, with waits of 10 and 60 seconds and without a word.
    waits = 'case "$*" in *--fetch-retries=1*) ;; *) echo "npm error waits" >&2 ;; esac'
    npm = f'#!/bin/sh\n{waits}\necho "npm error network" >&2\nexit 1\n'
    (tmp_path / "npm").write_text(npm, encoding="utf-8")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(MissingRequirementError, match=r"npm could not fetch onnxruntime-web \(network\)"):
        cnx.package(tiny_onnx_fp32, "browser", to=to)
    assert not to.exists()


def test_what_a_page_cannot_run_or_show_is_refused_by_name(
    tiny_engine: cnx.Artifact, tiny_onnx_bf16: cnx.Artifact, tiny_onnx_fp32: cnx.Artifact, pretended: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    def says(**fields: Any) -> Callable[[dict[str, Any]], object]:
        return lambda manifest: manifest["request"]["deploy"].update(fields)

    def copy(name: str, change: Callable[[dict[str, Any]], object]) -> Path:
        return altered_artifact(tiny_onnx_fp32, tmp_path / name, change)

    for artifact, said in (
        (tiny_engine, "is an engine, and a browser runs ONNX files"),
        (tiny_onnx_bf16, "computes in BF16, which onnxruntime-web does not"),
        (copy("embedding", says(outputs=["embedding"])), "gives embedding of the task classification"),
        (copy("batches", lambda manifest: manifest["request"].update(batch=[4, 8, 8])), "takes batches from 4"),
    ):
        with pytest.raises(InputError, match=said):
            cnx.package(artifact, "browser", to=tmp_path / "page", runtime=pretended)
