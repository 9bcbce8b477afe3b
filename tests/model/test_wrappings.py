"""A network is found wherever a file has it; what lies beside it is named, and of several one is chosen."""

import json
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from cnx_deploy import api
from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.errors import CheckpointError, CorruptArtifactError, InputError
from cnx_deploy.core.manifest import Artifact, manifest_from_json
from cnx_deploy.model.checkpoint import hash_weights, load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.recorded import model_record, recorded_model
from cnx_deploy.model.tasks import base
from cnx_deploy.model.tasks.base import register_task
from cnx_deploy.model.tasks.classification import Classification
from cnx_deploy.model.weight_files import read_weight_file
from tests.conftest import TINY_TEST
from tests.support.foreign_models import assert_same_weights, saved, timm_model
from tests.support.lies import FEW

State = dict[str, Tensor]
WORDS = ["state_dict", "model", "model_state_dict", "net", "module", "params", "network", "student", "backbone", "x1"]


@pytest.fixture(scope="module")
def networks():
    """Plain weights, averaged ones, and another network's."""
    return [random_model(TINY_TEST, 10, seed=seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def plain(networks):
    return networks[0]


@pytest.fixture(scope="module")
def averaged(networks):
    return networks[1]


@pytest.fixture(scope="module")
def other(networks):
    return networks[2]


class WithEmbedding(Classification):
    """A classifier whose head has a module of another name."""

    name = "with-embedding"

    def modules(self, variant, num_classes):
        return {**super().modules(variant, num_classes), "embed": torch.nn.Linear(variant.dims[3], 4)}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def loaded_from(content: object, tmp_path, **words):
    return load_checkpoint(saved(content, tmp_path / "file.pt"), TINY_TEST, **words)


def note_of(loaded, beginning: str) -> str:
    return next((note for note in loaded.notes if note.startswith(beginning)), "")


# --- any dictionary, any prefix ---------------------------------------------------------------------------------------


@FEW
@given(
    entries=st.lists(st.sampled_from(WORDS), max_size=3),
    modules=st.lists(st.sampled_from([*WORDS, "encoder", "_orig_mod", "_forward_module", "0"]), max_size=3),
    inside=st.sampled_from(["", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module._orig_mod."]),
)
def test_a_network_is_found_in_any_dictionaries_and_under_any_prefix(plain, tmp_path, entries, modules, inside):
    state = {re.sub(r"^(stages\.\d+\.)", rf"\1{inside}", name): each for name, each in plain.state_dict().items()}
    content = prefixed("".join(f"{module}." for module in modules), state)
    for entry in reversed(entries):
        content = {entry: content, "epoch": 3}
    assert_same_weights(loaded_from(content, tmp_path).model, plain)


@pytest.mark.parametrize("name", ["model_best.pth.tar", "weights", "weights.v2", "weights.safetensors.pt"])
@pytest.mark.parametrize("kind", ["archive", "legacy", "safetensors"])
def test_a_file_is_told_by_its_content_whatever_its_name(plain, tmp_path, name, kind):
    path = tmp_path / name
    if kind == "safetensors":
        saved(plain.state_dict(), tmp_path / "a.safetensors").rename(path)
    else:
        torch.save({"state_dict": plain.state_dict()}, path, _use_new_zipfile_serialization=kind == "archive")
    assert_same_weights(load_checkpoint(path, TINY_TEST).model, plain)


def test_a_text_is_no_checkpoint_by_its_content(tmp_path):
    (tmp_path / "model.pth.txt").write_text("not weights, although long enough to be some")
    with pytest.raises(InputError, match="no checkpoint by its content"):
        load_checkpoint(tmp_path / "model.pth.txt")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"criterion.weight": torch.ones(10)}, "state_dict.criterion.weight"),
        ({"val_acc.confmat": torch.zeros(10, 10, dtype=torch.long)}, "state_dict.val_acc.confmat"),
        ({"n_seen": torch.tensor(7)}, "state_dict.n_seen"),
        ({"broken": torch.full((3,), torch.nan)}, "state_dict.broken"),
        ({"model.aux.weight": torch.ones(2), "model.aux.bias": torch.ones(2)}, "state_dict.model.aux (2 tensors)"),
        ({f"text.layers.{at}.weight": torch.ones(2) for at in range(9)}, "state_dict.text (9 tensors)"),
        ({f"extra{at}": torch.ones(2) for at in range(9)}, "state_dict.extra5 and 3 more"),
    ],
)
def test_strangers_of_any_type_are_set_aside_by_name(plain, tmp_path, extra, said):
    state = prefixed("model.", plain.state_dict()) | extra
    loaded = loaded_from({"state_dict": state, "epoch": 3}, tmp_path)
    assert_same_weights(loaded.model, plain)
    assert said in note_of(loaded, "set aside")


def test_a_lightning_module_that_is_the_network_has_strangers_beside_its_own_modules(plain, tmp_path):
    state = plain.state_dict() | {"criterion.weight": torch.ones(10), "acc.total": torch.tensor(3)}
    loaded = loaded_from({"state_dict": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, tmp_path)
    assert_same_weights(loaded.model, plain)
    assert note_of(loaded, "set aside") == (
        "set aside: state_dict.criterion.weight, state_dict.acc.total, optimizer.state.0.exp_avg"
    )


@pytest.mark.parametrize("extra", ["stages.0.9.dwconv.weight", "head.hidden.weight", "downsample_layers.0.2.weight"])
def test_a_tensor_of_the_networks_own_modules_that_fits_nothing_is_an_error(plain, tmp_path, extra):
    state = prefixed("model.", plain.state_dict() | {extra: torch.ones(8, 1, 7, 7)})
    with pytest.raises(CheckpointError, match=rf"(?s)unexpected +{re.escape(extra)}"):
        loaded_from({"state_dict": state}, tmp_path)


def test_an_extra_block_under_timms_names_is_an_error(tmp_path):
    state = timm_model(TINY_TEST).state_dict()
    state["stages.0.blocks.9.conv_dw.weight"] = state["stages.0.blocks.0.conv_dw.weight"].clone()
    with pytest.raises(CheckpointError, match=r"(?s)unexpected +stages\.0\.9\.dwconv\.weight"):
        loaded_from({"state_dict": prefixed("net.", state)}, tmp_path)


@pytest.mark.parametrize("left_out", ["stages.2.1.pwconv1.", "stages.3.", "downsample_layers.0.0.bias", "norm.weight"])
def test_half_a_network_is_an_error_that_names_what_is_missing(plain, tmp_path, left_out):
    state = {name: tensor for name, tensor in plain.state_dict().items() if not name.startswith(left_out)}
    with pytest.raises(CheckpointError, match=rf"(?s)missing +{re.escape(left_out)}"):
        loaded_from({"model": prefixed("net.", state)}, tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        {"stem.0.weight": torch.ones(8, 3, 4, 4), "layers.0.weight": torch.ones(3)},
        {"features.0.0.weight": torch.ones(8, 3, 4, 4), "features.1.0.block.0.0.weight": torch.ones(3)},
        {"embeddings.patch_embeddings.projection.weight": torch.ones(8, 3, 4, 4)},
    ],
    ids=["timm", "torchvision", "transformers"],
)
def test_another_network_of_the_same_library_is_not_recognised(tmp_path, state):
    with pytest.raises(CheckpointError, match="holds no ConvNeXt weights"):
        loaded_from({"state_dict": state}, tmp_path)


def test_a_backbone_with_a_head_of_another_name_says_what_lies_beside_it(plain, tmp_path):
    state = {f"backbone.{name}": each for name, each in plain.state_dict().items() if not name.startswith("head.")}
    with pytest.raises(CheckpointError, match=r"no classification head.*set aside: fc \(2 tensors\)"):
        loaded_from(state | {"fc.weight": torch.ones(4, 64), "fc.bias": torch.ones(4)}, tmp_path)


def test_the_modules_of_another_task_are_no_strangers(tmp_path):
    task = WithEmbedding()
    register_task(task)
    try:
        model = random_model(TINY_TEST, 10, task=task)
        state = prefixed("net.", model.state_dict()) | {"net.other.weight": torch.ones(2)}
        loaded = loaded_from(state, tmp_path, task=task.name)
        assert_same_weights(loaded.model, model)
        assert note_of(loaded, "set aside") == "set aside: net.other.weight"
        assert (
            note_of(loaded_from(state, tmp_path), "set aside") == "set aside: net.embed (2 tensors), net.other.weight"
        )
    finally:
        base._TASKS.pop(task.name)


# --- several networks -------------------------------------------------------------------------------------------------


def test_two_networks_that_fit_equally_well_are_refused_by_name_and_one_can_be_chosen(plain, other, tmp_path):
    state = prefixed("student.backbone.", plain.state_dict()) | prefixed("teacher.backbone.", other.state_dict())
    path = saved({"state_dict": state}, tmp_path / "two.ckpt")
    with pytest.raises(CheckpointError, match=r"'state_dict.student.backbone', 'state_dict.teacher.backbone'.*--entry"):
        load_checkpoint(path, TINY_TEST)
    for entry in ("teacher", "teacher.backbone", "state_dict.teacher.backbone"):
        loaded = load_checkpoint(path, TINY_TEST, entry=entry)
        assert_same_weights(loaded.model, other)
    assert note_of(loaded, "not taken") == "not taken: 'state_dict.student.backbone'"
    with pytest.raises(CheckpointError, match="several networks"):
        load_checkpoint(path, TINY_TEST, entry="backbone")
    for entry in (".", "teach", ""):
        with pytest.raises(CheckpointError, match=r"no network called '.*', but 'state_dict.student.backbone', "):
            load_checkpoint(path, TINY_TEST, entry=entry)


def test_a_network_of_another_size_is_no_reason_to_choose(plain, tmp_path):
    """A large teacher has more tensors, and is no better than its student."""
    content = {"student": plain.state_dict(), "teacher": random_model("atto", 10).state_dict()}
    with pytest.raises(CheckpointError, match="several networks"):
        loaded_from(content, tmp_path)
    assert_same_weights(loaded_from(content, tmp_path, entry="student").model, plain)


def test_a_part_of_a_network_beside_a_whole_one_is_no_reason_to_choose(plain, other, tmp_path):
    """As an average of the trained layers alone would be."""
    part = {name: tensor for name, tensor in other.state_dict().items() if not name.startswith(("stages.0", "head"))}
    loaded = loaded_from({"later": part, "model": plain.state_dict()}, tmp_path)
    assert_same_weights(loaded.model, plain)
    assert note_of(loaded, "not taken") == "not taken: 'later'"


def test_two_networks_that_only_a_wrapper_tells_apart_are_two(plain, other, tmp_path):
    state = prefixed("net.", plain.state_dict()) | prefixed("net._orig_mod.", other.state_dict())
    with pytest.raises(CheckpointError, match=r"'net', 'net\._orig_mod'"):
        loaded_from(state, tmp_path)
    assert_same_weights(loaded_from(state, tmp_path, entry="net._orig_mod").model, other)


def test_the_top_of_a_file_can_be_chosen(plain, other, tmp_path):
    content = plain.state_dict() | prefixed("twin.", other.state_dict())
    assert_same_weights(loaded_from(content, tmp_path, entry=".").model, plain)


def test_one_network_under_two_names_is_one(plain, tmp_path):
    """As Lightning saves `self.model` beside `self.compiled = torch.compile(self.model)`."""
    state = plain.state_dict()
    both = prefixed("model.", state) | prefixed("compiled._orig_mod.", state)
    assert_same_weights(loaded_from({"state_dict": both}, tmp_path).model, plain)
    both["compiled._orig_mod.norm.bias"] = state["norm.bias"] + 1e-6
    with pytest.raises(CheckpointError, match="several networks"):
        loaded_from({"state_dict": both}, tmp_path)


# --- averages ---------------------------------------------------------------------------------------------------------

WITH_BOTH = ("entry", "timm", "average first", "module", "mmengine", "lightning")


def file_of_both(kind: str, plain: State, averaged: State) -> dict[str, object]:
    return {
        "entry": {"model": plain, "model_ema": averaged},
        "timm": {"state_dict": plain, "state_dict_ema": averaged, "arch": "x"},
        "average first": {"ema": averaged, "net": plain},
        "module": {"state_dict": prefixed("model.", plain) | prefixed("ema_model.module.", averaged)},
        "mmengine": {
            "meta": {"mmengine_version": "0.10.7"}, "state_dict": averaged,
            "ema_state_dict": prefixed("module.", plain) | {"steps": torch.tensor(5)},
        },
        "lightning": {
            "state_dict": prefixed("model.", averaged), "current_model_state": prefixed("model.", plain),
            "averaging_state": {"n_averaged": torch.tensor(5)},
        },
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", WITH_BOTH)
def test_of_plain_and_averaged_weights_those_asked_for_are_taken_and_the_default_is_said(
    plain, averaged, tmp_path, kind
):
    """mmengine and Lightning's WeightAveraging save the average as `state_dict`, and load that."""
    path = saved(file_of_both(kind, plain.state_dict(), averaged.state_dict()), tmp_path / "both.pth")
    loads_average = kind in ("mmengine", "lightning")
    assert_same_weights(load_checkpoint(path, TINY_TEST, ema=True).model, averaged)
    assert_same_weights(load_checkpoint(path, TINY_TEST, ema=False).model, plain)
    loaded = load_checkpoint(path, TINY_TEST)
    assert_same_weights(loaded.model, averaged if loads_average else plain)
    option = "--no-ema (ema=False)" if loads_average else "--ema (ema=True)"
    assert option in note_of(loaded, "averaged weights (EMA), as" if loads_average else "plain weights")


@pytest.mark.parametrize("kind", ["entry", "AveragedModel", "AveragedModel inside"])
def test_averaged_weights_alone_are_taken_and_said_to_be(averaged, tmp_path, kind):
    state = averaged.state_dict() if kind == "entry" else AveragedModel(averaged).state_dict()
    content = {"entry": {"model_ema": state}, "AveragedModel": state}.get(kind, {"state_dict": prefixed("net.", state)})
    loaded = loaded_from(content, tmp_path)
    assert_same_weights(loaded.model, averaged)
    assert "averaged weights (EMA)" in loaded.notes
    assert_same_weights(loaded_from(content, tmp_path, ema=True).model, averaged)
    with pytest.raises(CheckpointError, match="has no plain weights"):
        loaded_from(content, tmp_path, ema=False)


@pytest.mark.parametrize("prefix", ["", "schema.", "cinema.net."])
def test_asking_for_absent_ema_weights_is_an_error(plain, tmp_path, prefix):
    with pytest.raises(CheckpointError, match="has no EMA weights"):
        loaded_from({"model": prefixed(prefix, plain.state_dict())}, tmp_path, ema=True)


# --- what a command does with a choice --------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "index", "entry"), [((), 0, None), (("--ema",), 1, "state_dict_ema")])
@pytest.mark.slow
def test_export_takes_the_chosen_weights_says_so_and_finds_them_again(cnx, networks, tmp_path, words, index, entry):
    both = file_of_both("timm", *(network.state_dict() for network in networks[:2]))
    path = saved(both | {"optimizer": {"x": torch.ones(1)}}, tmp_path / "model_best.pth.tar")
    fixed = ("--variant", "tiny-test", "--image-size", 32, "--precision", "fp32", "--batch", "1", "--no-verify")
    code, _, told = cnx("export", *fixed, "--checkpoint", path, "--output-dir", tmp_path / "export", *words)
    assert code == 0, told
    artifact = open_artifact(next((tmp_path / "export").glob("*.json")))
    weights = artifact.manifest.model.weights
    assert (weights.sha256, weights.entry) == (hash_weights(networks[index]), entry)
    written = artifact.manifest.to_json()
    assert ("entry" in json.loads(written)["model"]["weights"]) == (entry is not None)
    assert manifest_from_json(written.encode()) == artifact.manifest
    assert_same_weights(recorded_model(artifact).model, networks[index])
    assert f"Note: weights from the entry {entry or 'state_dict'!r}\n" in told
    assert "Note: set aside: optimizer.x\n" in told
    assert ("--ema (ema=True)" in told) == (words == ())


@pytest.mark.parametrize(("ema", "index", "entry"), [(None, 0, None), (True, 1, "state_dict_ema")])
def test_what_an_export_records_leads_back_to_the_chosen_weights(networks, tiny_onnx_fp32, tmp_path, ema, index, entry):
    """The same without the file, which takes seconds."""
    path = saved(file_of_both("timm", *(network.state_dict() for network in networks[:2])), tmp_path / "best.pth.tar")
    told: list[str] = []
    request = api.ExportRequest(variant="tiny-test", checkpoint=path, ema=ema)
    record = model_record(*request.load(told.append), tmp_path / "export")
    assert (record.weights.sha256, record.weights.entry) == (hash_weights(networks[index]), entry)
    manifest = replace(tiny_onnx_fp32.manifest, model=record)
    (tmp_path / "export").mkdir()
    assert ("entry" in json.loads(manifest.to_json())["model"]["weights"]) == (entry is not None)
    assert manifest_from_json(manifest.to_json().encode()) == manifest
    made = Artifact(tmp_path / "export" / "best.onnx", manifest)
    assert_same_weights(recorded_model(made).model, networks[index])
    assert f"Note: weights from the entry {entry or 'state_dict'!r}" in told
    assert any("--ema (ema=True)" in text for text in told) == (ema is None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ema",), "has no EMA weights"),
        (("--no-ema", "--entry", "model_ema"), "has no network called 'model_ema'"),
        (("--entry", "teacher"), "has no network called 'teacher'"),
    ],
)
@pytest.mark.parametrize("command", [("export",), ("diagnose", "headroom")])
def test_a_choice_that_is_not_there_is_one_error(cnx, plain, tmp_path, command, words, message):
    path = saved({"model": plain.state_dict()}, tmp_path / "plain.pth")
    source = ("--checkpoint", path) if command == ("export",) else (path,)
    code, _, told = cnx(*command, "--variant", "tiny-test", *source, *words)
    assert (code, message in told) == (2, True)
    code, _, told = cnx(*command, "--variant", "tiny-test", *words)
    assert (code, "choose among the weights of a checkpoint" in told) == (2, True)


def test_averages_alone_are_no_plain_weights_for_a_command(cnx, averaged, tmp_path):
    path = saved({"model_ema": averaged.state_dict()}, tmp_path / "averages.pth")
    code, _, told = cnx("export", "--variant", "tiny-test", "--checkpoint", path, "--no-ema")
    assert (code, "has no plain weights, but 'model_ema'" in told) == (2, True)


def test_inspect_and_predict_say_what_they_chose_and_predict_takes_the_other(cnx, networks, tmp_path):
    path = saved(file_of_both("entry", *(network.state_dict() for network in networks[:2])), tmp_path / "best.pth.tar")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    answers = []
    for words in ((), ("--ema",), ("--entry", "model_ema")):
        code, out, told = cnx("predict", path, tmp_path / "a.png", "--json", *words)
        assert (code, "Note: plain weights; --ema" in told) == (0, words == ())
        answers.append([score["probability"] for score in json.loads(out)["predictions"][0]["scores"]])
    alone = save_checkpoint(tmp_path / "alone.safetensors", networks[1])
    expected = [score.probability for score in api.predict(alone, tmp_path / "a.png").scores]
    assert answers[0] != expected
    assert answers[1:] == [expected, expected]
    code, out, _ = cnx("inspect", path)
    assert (code, "Note: plain weights; --ema" in out) == (0, True)


def test_an_onnx_file_has_no_weights_to_choose_from(cnx, tiny_onnx_fp32):
    code, _, told = cnx("eval", tiny_onnx_fp32.path, "images", "--ema")
    assert (code, "is no checkpoint, so --ema (ema) has nothing to choose from" in told) == (2, True)


# --- files that lie ---------------------------------------------------------------------------------------------------


def branching() -> dict[str, object]:
    """Ten thousand million entries in a file of two kilobytes."""
    level: dict[str, object] = {"stages": torch.ones(1)}
    for _ in range(10):
        level = {str(at): level for at in range(10)}
    return level


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (branching, CorruptArtifactError, "at most 200,000 entries"),
        (lambda: {"x" * 2000: torch.ones(1)}, CorruptArtifactError, "at most 500 printable"),
        (lambda: {"a\nb.downsample_layers.0.0.weight": torch.ones(1)}, CorruptArtifactError, "printable"),
        (
            lambda: {f"{at}.downsample_layers.0.0.weight": torch.ones(1) for at in range(99)},
            CheckpointError, "there are 99 networks, expected at most 16",
        ),
        (lambda: {"a": {"b": torch.ones(1)}, "a.b": torch.ones(2)}, CheckpointError, "two tensors are called 'a.b'"),
    ],
)  # fmt: skip
def test_names_that_would_take_time_or_memory_are_refused(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        read_weight_file(saved(make(), tmp_path / "a.pt"))


def test_a_dictionary_that_contains_itself_ends(plain, tmp_path):
    knot: dict[str, object] = {"model": plain.state_dict()}
    knot["again"] = knot
    assert_same_weights(loaded_from(knot, tmp_path).model, plain)


# --- files that a library wrote ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of Lightning itself, at its own calls
def test_a_file_of_lightnings_weight_averaging_has_both_weights(tmp_path):
    """One epoch of one step; the file is that of ModelCheckpoint, with a path among its hyper-parameters."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

    class Module(lightning.LightningModule):
        def __init__(self, folder: Path, classes: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net, self.criterion = random_model(TINY_TEST, classes), torch.nn.CrossEntropyLoss(torch.ones(classes))

        def training_step(self, batch, index):
            return self.criterion(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    data = torch.utils.data.TensorDataset(torch.rand(4, 3, 32, 32), torch.arange(4))
    averaging, saving = WeightAveraging(), ModelCheckpoint(tmp_path, "last", monitor=None, save_top_k=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=3, callbacks=[averaging, saving], default_root_dir=tmp_path, **quiet)
    trainer.fit(Module(tmp_path, 10), torch.utils.data.DataLoader(data, batch_size=4))
    (path,) = tmp_path.glob("last*.ckpt")
    stored = torch.load(path, weights_only=False)
    plain = {name: stored["current_model_state"][f"net.{name}"] for name in random_model(TINY_TEST, 10).state_dict()}
    loaded = load_checkpoint(path, TINY_TEST)
    assert note_of(loaded, "averaged weights (EMA), as")
    assert note_of(loaded, "set aside: state_dict.criterion.weight")
    chosen = load_checkpoint(path, TINY_TEST, ema=False).model.state_dict()
    torch.testing.assert_close(dict(chosen), plain, rtol=0, atol=0)
    assert not torch.equal(loaded.model.head.weight, chosen["head.weight"])
    assert read_weight_file(path).beside["hyper_parameters"] == {"folder": PurePosixPath(tmp_path), "classes": 10}
