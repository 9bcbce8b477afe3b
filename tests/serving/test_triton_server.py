"""A real Triton server runs repositories as they are written, with `predict` beside it in this process.

The server, its ensembles, batcher, queues and python backend are Triton's own; the ONNX Runtime backend is a stand-in
(tests/support/triton_backends), so that nothing here says how fast Triton's is.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from PIL import Image

import cnx_deploy as cnx
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data.preprocessing import runner_input, to_pixels
from cnx_deploy.serving.triton_config import ENUMS, MESSAGES, config_from_text
from tests.support.triton_server import VENV, Server, ServerEndedError, in_triton, triton_server

pytestmark = [
    pytest.mark.triton,
    pytest.mark.timeout(900),  # of the first test, which waits for eleven exports
    pytest.mark.skipif(not VENV.is_dir(), reason=".venv-triton is not there: scripts/venv-triton makes it"),
]

NAMES = tuple(f"class {number}" for number in range(10))
OTHER_PIXELS = {
    "crop_mode": "border", "pad_value": (10.0, 20.0, 30.0), "interpolation": "bilinear", "crop_ratio": 0.9,
}  # fmt: skip
EXPORTS: dict[str, dict[str, Any]] = {
    "plain": {"outputs": ("logits", "embedding"), "class_names": NAMES},
    "pixels": {"input_kind": "uint8", "image_size": (48, 64), **OTHER_PIXELS},
    "grey": {"in_chans": 1, "input_kind": "uint8"},
    "fixed": {"batch": (4, 4, 4)},
    "open": {"image_size": (64, 96, 128)},
    "tags": {"task": "multi-label", "class_names": NAMES},
    "top": {"outputs": ("top5",)},
    "features": {"task": "features", "outputs": ("embedding", "maps"), "num_classes": None},
    "segment": {
        "task": "segment", "image_size": 64, "outputs": ("logits", "labels"), "task_options": {"channels": 16},
    },
    "detect": {
        "task": "detect", "image_size": 64, "outputs": ("boxes",),
        "task_options": {
            "masks": False, "detections": 10, "proposals": 20, "pre_nms": 20, "candidates": 20, "channels": 16,
            "box_channels": 32, "passes": 2,
        },
        "num_classes": 3,
    },
}  # fmt: skip
"""Name of a network -> how it differs from the smallest classifier at 32 px, ten classes, batch 1 to 8."""


def photograph() -> Image.Image:
    """A picture with edges, 320 by 213 pixels, each channel of its own."""
    from sklearn.datasets import load_sample_images

    return Image.fromarray(load_sample_images().images[0]).resize((320, 213))


def write_pictures(folder: Path) -> dict[str, Path]:
    """A picture in the formats and modes that cameras, editors and scanners write."""
    photo = photograph()
    exif = Image.Exif()
    exif[274] = 6  # Orientation: turned by a quarter
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257 + 3)
    see_through = photo.convert("RGBA")
    see_through.putalpha(photo.convert("L"))
    written: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "photo.jpg": (photo, {"quality": 90}),
        "turned.jpg": (photo, {"exif": exif}),
        "grey.jpg": (photo.convert("L"), {}),
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "photo.webp": (photo, {"quality": 80}),
        "palette.png": (photo.quantize(32), {"transparency": 3}),
        "sixteen.png": (deep, {}),
        "sixteen.tif": (deep, {}),
        "alpha.png": (see_through, {}),
        "one.bmp": (photo.convert("1"), {}),
        "small.gif": (photo.resize((9, 7)).quantize(16), {}),
    }
    for name, (image, words) in written.items():
        image.save(folder / name, **words)
    return {name: folder / name for name in written}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def artifacts(tiny_variant: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, cnx.Artifact]:
    """A file of each kind, by the name of its network."""
    from tests.support.foreign_files import exported, network  # transformers, which not every environment has

    folder = tmp_path_factory.mktemp("export")
    made = {}
    for name, words in EXPORTS.items():
        common: dict[str, Any] = {"image_size": 32, "num_classes": 10, "batch": (1, 4, 8), "no_verify": True}
        words = {"precision": "fp32", "output_dir": folder, **common, **words}
        made[name] = cnx.export(tiny_variant.name, name=name, **words)
    original = exported(network("timm", tiny_variant), folder / "original.onnx")
    images = {
        "mean": 0.4,
        "std": (0.2, 0.25, 0.3),
        "crop_ratio": 1.0,
        "crop_mode": "squash",
        "interpolation": "bilinear",
    }
    rescued = cnx.rescue(original, output_dir=folder, name="rescued", batch=(1, 4, 8), **images).artifact
    assert rescued is not None
    return {**made, "rescued": rescued}


@pytest.fixture(scope="module")
def models(artifacts: dict[str, cnx.Artifact]) -> Iterator[dict[str, cnx.Model]]:
    """The same networks, opened as `predict` opens them."""
    opened = {name: cnx.load(artifact) for name, artifact in artifacts.items()}
    yield opened
    for model in opened.values():
        model.__exit__(None, None, None)


@pytest.fixture(scope="module")
def repository(artifacts: dict[str, cnx.Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One repository of all networks; `plain` with ONE process for pictures, which takes several requests at once."""
    folder = tmp_path_factory.mktemp("repository") / "models"
    made = cnx.package([*artifacts.values()], "triton", to=folder, preprocessing_instances=1, storage_uri="pvc://a/b")
    assert len(made.models) == 3 * len(artifacts)
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with triton_server(repository, tmp_path_factory.mktemp("server")) as running:
        yield running


def stem(artifacts: dict[str, cnx.Artifact], name: str) -> str:
    return artifacts[name].manifest.stem


def outputs_of(model: cnx.Model, path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.outputs(path).items()}


# What goes in and comes out.


@pytest.mark.parametrize(
    "picture",
    [
        "photo.jpg", "turned.jpg", "grey.jpg", "cmyk.jpg", "photo.webp", "palette.png", "sixteen.png", "sixteen.tif",
        "alpha.png", "one.bmp", "small.gif",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["pixels", "grey"])
def test_the_server_makes_the_pixels_of_predict_byte_for_byte(
    name: str, picture: str, server: Server, artifacts: dict[str, cnx.Artifact], pictures: dict[str, Path]
) -> None:
    preprocessing, path = artifacts[name].manifest.model.preprocessing, pictures[picture]
    answer = server.ask(f"{stem(artifacts, name)}-preprocessing", {"image": [path.read_bytes()]})
    served = answer.outputs["images"]
    assert served.dtype == np.uint8
    assert np.array_equal(served[0], to_pixels(path, preprocessing).numpy())
    if name == "pixels" and picture == "photo.jpg":  # another crop would be seen
        other = Preprocessing(image_size=(48, 64))
        assert not np.array_equal(served[0], to_pixels(path, other).numpy())


@pytest.mark.parametrize("name", ["plain", "rescued"])
def test_the_server_makes_the_floats_of_predict_to_the_bit(
    name: str, server: Server, artifacts: dict[str, cnx.Artifact], pictures: dict[str, Path]
) -> None:
    made, path = artifacts[name].manifest.model.preprocessing, pictures["photo.jpg"]
    answer = server.ask(f"{stem(artifacts, name)}-preprocessing", {"image": [path.read_bytes()]})
    kind = artifacts[name].manifest.deploy.input_kind
    assert kind == ("float" if name == "plain" else "normalised")
    (served,) = answer.outputs.values()
    assert np.array_equal(served, runner_input(to_pixels(path, made)[None], kind, made).numpy())


@pytest.mark.parametrize("name", [name for name in (*EXPORTS, "rescued") if name != "fixed"])
def test_the_answer_for_a_picture_is_onnx_runtimes_bit_for_bit(
    name: str, server: Server, artifacts: dict[str, cnx.Artifact], models: dict[str, cnx.Model],
    pictures: dict[str, Path],
) -> None:  # fmt: skip
    path = pictures["turned.jpg"]
    answer, expected = server.post(stem(artifacts, name), path.read_bytes()), outputs_of(models[name], path)
    assert answer.status == 200
    assert answer.outputs.keys() == expected.keys()
    for output, values in expected.items():
        assert np.array_equal(answer.outputs[output], values), output


def test_a_network_of_a_fixed_batch_takes_as_many_pictures(
    server: Server, artifacts: dict[str, cnx.Artifact], models: dict[str, cnx.Model], pictures: dict[str, Path]
) -> None:
    paths = [pictures[name] for name in ("photo.jpg", "turned.jpg", "grey.jpg", "cmyk.jpg")]
    answer = server.ask(stem(artifacts, "fixed"), {"image": [path.read_bytes() for path in paths]}, shape=[4])
    assert np.array_equal(answer.outputs["logits"], models["fixed"].outputs(paths)["logits"].numpy())
    assert server.ask(stem(artifacts, "fixed"), {"image": [paths[0].read_bytes()] * 3}, shape=[3]).status == 400


def test_class_names_come_with_scores(
    server: Server, artifacts: dict[str, cnx.Artifact], models: dict[str, cnx.Model], pictures: dict[str, Path]
) -> None:
    best = models["plain"].predict(pictures["photo.jpg"]).scores
    asked = [{"name": "logits", "parameters": {"classification": 5, "binary_data": True}}]
    answer = server.ask(stem(artifacts, "plain"), {"image": [pictures["photo.jpg"].read_bytes()]}, asked)
    # "score:index:label"
    assert [row.split(":")[1:] for row in answer.outputs["logits"]] == [[str(row.index), row.name] for row in best]


def test_curl_sends_a_file_as_the_page_says(
    server: Server, artifacts: dict[str, cnx.Artifact], pictures: dict[str, Path], tmp_path: Path
) -> None:
    words = ["curl", "--silent", "--fail", "--data-binary", f"@{pictures['photo.jpg']}"]
    words += ["-H", "Inference-Header-Content-Length: 0", "-H", "Accept: application/json", "-o", str(tmp_path / "out")]
    subprocess.run([*words, server.url(f"models/{stem(artifacts, 'plain')}/infer")], check=True, timeout=60)
    assert b'"name":"logits","datatype":"FP32","shape":[1,10]' in (tmp_path / "out").read_bytes()


GRPC = """
import json, sys
import numpy as np
import tritonclient.grpc as grpc

address, model, path = sys.argv[1:]
client = grpc.InferenceServerClient(address)
image = grpc.InferInput("image", [1, 1], "BYTES")
image.set_data_from_numpy(np.array([[open(path, "rb").read()]], dtype=object))
answer = client.infer(model, [image])
parameters = client.get_model_config(model, as_json=True)["config"]["parameters"]
try:
    image.set_data_from_numpy(np.array([[b"no picture"]], dtype=object))
    client.infer(model, [image])
except grpc.InferenceServerException as error:
    refused = [error.status(), error.message()]
outputs = {name: answer.as_numpy(name).tobytes().hex() for name in ("logits", "embedding")}
print(json.dumps({"outputs": outputs, "licence": parameters["weights_licence"]["string_value"], "refused": refused}))
"""


def test_grpc_gives_the_same_bytes_the_same_error_and_the_licence(
    server: Server, artifacts: dict[str, cnx.Artifact], models: dict[str, cnx.Model], pictures: dict[str, Path]
) -> None:
    told = in_triton(GRPC, f"127.0.0.1:{server.grpc}", stem(artifacts, "plain"), pictures["cmyk.jpg"])
    expected = outputs_of(models["plain"], pictures["cmyk.jpg"])
    assert told["outputs"] == {name: values.tobytes().hex() for name, values in expected.items()}
    assert told["licence"] == artifacts["plain"].manifest.model.weights.licence
    assert told["refused"][0] == "StatusCode.INVALID_ARGUMENT"
    assert "cannot be read as an image" in told["refused"][1]


# Batches, warm-up, queues.


def test_eight_clients_share_batches_and_each_gets_its_own_answer(
    server: Server, artifacts: dict[str, cnx.Artifact], models: dict[str, cnx.Model], pictures: dict[str, Path]
) -> None:
    name, paths = stem(artifacts, "plain"), list(pictures.values())
    expected = [outputs_of(models["plain"], path)["logits"] for path in paths]
    before = server.batches(f"{name}-network")

    def client(number: int) -> float:
        worst = 0.0
        for turn in range(20):
            at = (number + turn) % len(paths)
            given = server.post(name, paths[at].read_bytes()).outputs["logits"]
            worst = max(worst, float(np.abs(given - expected[at]).max()))
        return worst

    with ThreadPoolExecutor(8) as pool:
        worst = max(pool.map(client, range(8)))
    run = {size: count - before.get(size, 0) for size, count in server.batches(f"{name}-network").items()}
    assert sum(size * count for size, count in run.items()) == 160
    assert sum(count for size, count in run.items() if size > 1) > 0.2 * sum(run.values()), run
    # Products of several rows are summed in another order; pictures differ by 0.1 and more.
    assert worst < 1e-4


def test_a_model_is_ready_only_after_its_warm_up(artifacts: dict[str, cnx.Artifact], tmp_path: Path) -> None:
    cnx.package(artifacts["plain"], "triton", to=tmp_path / "models", name="warm")
    cnx.package(artifacts["plain"], "triton", to=tmp_path / "others", name="cold")
    for part in ("cold", "cold-network", "cold-preprocessing"):
        path = tmp_path / "others" / part / "config.pbtxt"
        message = config_from_text(path.read_text(encoding="utf-8"))
        message.ClearField("model_warmup")
        path.write_text(str(message), encoding="utf-8")
        shutil.move(tmp_path / "others" / part, tmp_path / "models")
    record = tmp_path / "models" / "cold-preprocessing" / "1" / "preprocessing.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "pillow": "1.0"}))
    with triton_server(tmp_path / "models", tmp_path) as running:  # which waits until it is ready and sends nothing
        assert running.batches("warm-network") == {1: 1, 4: 1, 8: 1}
        assert running.batches("warm-preprocessing") == {1: 2}  # one for each process
        assert running.batches("cold-network") == {}
        assert running.batches("cold-preprocessing") == {}
        assert "and 1.0 was there when the repository was written" in running.log


def test_a_full_queue_and_a_long_wait_are_refused_at_once(
    artifacts: dict[str, cnx.Artifact], pictures: dict[str, Path], tmp_path: Path
) -> None:
    words: dict[str, Any] = {"max_delay_ms": 3000.0, "preprocessing_instances": 1}
    cnx.package(artifacts["plain"], "triton", to=tmp_path / "models", name="full", queue_limit=1, **words)
    cnx.package(artifacts["plain"], "triton", to=tmp_path / "more", name="late", queue_timeout_ms=200.0, **words)
    for part in (tmp_path / "more").iterdir():
        shutil.move(part, tmp_path / "models")
    images = np.zeros((1, 3, 32, 32), np.float32)
    with triton_server(tmp_path / "models", tmp_path) as running, ThreadPoolExecutor(2) as pool:
        begin = time.monotonic()
        first = pool.submit(running.ask, "full-network", {"images": images})
        time.sleep(0.5)
        second = running.ask("full-network", {"images": images})
        assert time.monotonic() - begin < 2.5
        assert (second.status, "maximum queue size" in (second.error or "")) == (503, True)
        assert first.result().status == 200
        late = running.ask("late-network", {"images": images})
        assert "timeout expired" in (late.error or "")
        assert late.status != 200


# Faults.


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "cannot be read as an image"),
        (b"no picture " * 30, "cannot be read as an image"),
        ("cut", "truncated"),
        ("bomb", "limit 89000000"),
    ],
    ids=["empty", "text", "truncated", "bomb"],
)
def test_a_file_that_is_no_picture_gets_400_and_a_sentence(
    content: Any, sentence: str, server: Server, artifacts: dict[str, cnx.Artifact], pictures: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    if content == "cut":
        content = pictures["photo.jpg"].read_bytes()[:5000]
    elif content == "bomb":
        Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
        content = (tmp_path / "bomb.png").read_bytes()
    answer = server.post(stem(artifacts, "plain"), content)
    assert answer.status == 400
    assert sentence in (answer.error or "")
    assert "Replace or remove it." in (answer.error or "")
    assert "BytesIO" not in (answer.error or "")


def test_a_request_of_several_pictures_says_which_one_is_none(
    server: Server, artifacts: dict[str, cnx.Artifact], pictures: dict[str, Path]
) -> None:
    good = pictures["photo.jpg"].read_bytes()
    answer = server.ask(stem(artifacts, "plain"), {"image": [good, b"no picture", good]})
    assert answer.status == 400
    assert "Image 2 of 3: The file cannot be read" in (answer.error or "")


def test_a_wrong_type_and_too_large_a_batch_get_400(
    server: Server, artifacts: dict[str, cnx.Artifact], pictures: dict[str, Path]
) -> None:
    name = stem(artifacts, "plain")
    wrong = server.ask(f"{name}-network", {"images": np.zeros((1, 3, 32, 32), np.uint8)})
    assert (wrong.status, "expects 'FP32'" in (wrong.error or "")) == (400, True)
    large = server.ask(name, {"image": [pictures["photo.jpg"].read_bytes()] * 9})
    assert (large.status, "batch-size must be <= 8" in (large.error or "")) == (400, True)
    shape = server.ask(f"{name}-network", {"images": np.zeros((1, 3, 32, 33), np.float32)})
    assert (shape.status, "unexpected shape" in (shape.error or "")) == (400, True)
    unknown = server.ask("nobody", {"image": [b""]})
    assert unknown.status == 404


def test_a_broken_picture_hurts_no_other_request_of_its_batch(
    artifacts: dict[str, cnx.Artifact], models: dict[str, cnx.Model], pictures: dict[str, Path], tmp_path: Path
) -> None:
    cnx.package(artifacts["plain"], "triton", to=tmp_path / "models", name="net", preprocessing_instances=1)
    path = tmp_path / "models" / "net-preprocessing" / "config.pbtxt"
    message = config_from_text(path.read_text(encoding="utf-8"))  # so that it is given several requests at once
    del message.dynamic_batching.preferred_batch_size[:]
    message.dynamic_batching.preferred_batch_size.append(8)
    message.dynamic_batching.max_queue_delay_microseconds = 500_000
    path.write_text(str(message), encoding="utf-8")
    good, expected = pictures["photo.jpg"], outputs_of(models["plain"], pictures["photo.jpg"])["logits"]
    with triton_server(tmp_path / "models", tmp_path) as running, ThreadPoolExecutor(8) as pool:
        before = running.stats("net-preprocessing")["execution_count"]
        contents = [good.read_bytes() if number % 3 else b"no picture" for number in range(32)]
        answers = list(pool.map(lambda content: running.post("net", content), contents))
        ran = running.stats("net-preprocessing")["execution_count"] - before
    assert ran < 16  # in batches of several requests
    assert [answer.status for answer in answers] == [200 if number % 3 else 400 for number in range(32)]
    for answer in answers:
        if answer.status == 200:
            assert np.abs(answer.outputs["logits"] - expected).max() < 1e-4


BROKEN = {
    "name": ("net-network", 'name: "net-network"', 'name: "other"', "its folder 'net-network'", "other"),
    "preferred": ("net-network", "batch_size: 8\n  max", "batch_size: 9\n  max", "preferred_batch_size 9", "preferred"),
    "backend": ("net-network", '"onnxruntime"', '"onnx"', "no backend is called 'onnx'", "onnx"),
    "mapping": ("net", 'input_map {\n      key: "images"', 'input_map {\n      key: "x"', "no input 'x'", "x"),
    "file": ("net-network", None, None, "was altered", "net-network"),
}
"""Fault -> model, text and what stands for it, what the check says, and a word of what the server says."""


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_repository_is_refused_by_the_check_and_by_the_server(
    fault: str, artifacts: dict[str, cnx.Artifact], tmp_path: Path
) -> None:
    cnx.package(artifacts["plain"], "triton", to=tmp_path / "models", name="net", preprocessing_instances=1)
    model, old, new, found, told = BROKEN[fault]
    if old is None:
        file = next((tmp_path / "models" / model / "1").glob("*.onnx"))
        file.write_bytes(file.read_bytes()[:2000])
        found = "bytes, its manifest says"
    else:
        path = tmp_path / "models" / model / "config.pbtxt"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert any(found in finding for finding in cnx.check_package(tmp_path / "models").findings)
    with pytest.raises(ServerEndedError, match=told), triton_server(tmp_path / "models", tmp_path):
        pass


# Against the newest configuration message, and the other way round.

PARSE = """
import json, sys
from pathlib import Path
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

configs = {}
for path in Path(sys.argv[1]).glob("*/config.pbtxt"):
    message = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    configs[path.parent.name] = json_format.MessageToDict(message, preserving_proto_field_name=True)

def kind(field):
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return "map " + kind(field.message_type.fields_by_name["value"])
    repeated = "repeated " if field.is_repeated else ""
    if field.message_type is not None:
        return repeated + "message"
    if field.enum_type is not None:
        return repeated + "enum"
    scalars = {9: "string", 8: "bool", 5: "int32", 3: "int64", 13: "uint32", 4: "uint64"}
    return repeated + scalars.get(field.type, "other")

def walk(message, seen):
    if message.full_name not in seen:
        seen[message.full_name] = {
            field.name: [
                kind(field),
                field.message_type.full_name if field.message_type is not None else None,
                [value.name for value in field.enum_type.values] if field.enum_type is not None else [],
            ]
            for field in message.fields
        }
        for field in message.fields:
            if field.message_type is not None:
                walk(field.message_type, seen)
    return seen

print(json.dumps({"configs": configs, "fields": walk(model_config_pb2.ModelConfig.DESCRIPTOR, {})}))
"""


def test_configurations_parse_with_tritons_newest_message_to_the_same(
    repository: Path, artifacts: dict[str, cnx.Artifact]
) -> None:
    told = in_triton(PARSE, repository)
    assert len(told["configs"]) == 3 * len(artifacts)
    for name, config in told["configs"].items():
        own = config_from_text((repository / name / "config.pbtxt").read_text(encoding="utf-8"))
        mine = json_format.MessageToDict(own, preserving_proto_field_name=True)
        assert without_defaults(mine) == without_defaults(config), name
    pairs, seen = [("ModelConfig", "inference.ModelConfig")], set[str]()
    while pairs:
        mine, theirs = pairs.pop()
        if mine in seen:
            continue
        seen.add(mine)
        for field, declared in MESSAGES[mine].items():
            kind, message, values = told["fields"][theirs][field]
            *words, last = declared.split()
            plain = "enum" if last in ENUMS else "message" if last in MESSAGES else last
            assert kind == " ".join((*words, plain)), (mine, field)
            if last in ENUMS:
                assert set(ENUMS[last]) <= set(values), (mine, field)
            if last in MESSAGES:
                if words == ["map"]:
                    message = told["fields"][message]["value"][1]
                pairs.append((last, message))
    assert seen == set(MESSAGES)


def without_defaults(value: Any) -> Any:
    """The same without what stands at its default, which one message writes and the other does not."""
    if isinstance(value, dict):
        return {
            name: without_defaults(each)
            for name, each in value.items()
            if each not in (0, "", False, "0", "KIND_AUTO", "REJECT")
        }
    return [without_defaults(each) for each in value] if isinstance(value, list) else value


def test_the_repository_of_the_server_has_nothing_wrong(repository: Path) -> None:
    assert cnx.check_package(repository).findings == ()


def test_what_a_network_is_stands_at_its_address(server: Server, artifacts: dict[str, cnx.Artifact]) -> None:
    told = server.get(f"models/{stem(artifacts, 'plain')}/config")["parameters"]
    assert told["weights_licence"]["string_value"] == "none (random weights)"
    assert told["note"]["string_value"] == "The weights are random: the answers mean nothing."
    assert json.dumps(told).count("sha256") == 3
