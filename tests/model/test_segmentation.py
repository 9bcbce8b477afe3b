import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cnx_deploy.core.class_names import NOT_COUNTED
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CheckpointError, InputError
from cnx_deploy.core.gates import GATES, OutputSpec
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, create_model, random_model
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.model.tasks.upernet import LabelMap, bilinear_matrix, pooling_matrix
from cnx_deploy.verification.parity import comparable, differences
from tests.conftest import TINY_TEST, TINY_V1_TEST
from tests.support.upernet import transformers_upernet

CANVAS, CLASSES = (64, 96), 5
SMALL = find_task("segment").configured({"channels": 16, "auxiliary_channels": 8})
WORDS = ("logits", "labels", "full-logits")


@pytest.fixture(scope="module")
def network() -> ConvNeXtV2:
    return random_model(TINY_TEST, CLASSES, task=SMALL).double()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, *CANVAS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def normalised(images: torch.Tensor, spec: DeploySpec) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (images - mean) / std


def test_the_training_form_equals_transformers_upernet_in_float64(network, images):
    inputs = normalised(images, DeploySpec(image_size=CANVAS))
    with torch.no_grad():
        expected = transformers_upernet(network).double()(inputs).logits  # at the size of the images
        outputs = network.forward_outputs(inputs, WORDS)
        other = random_model(TINY_TEST, CLASSES, task=SMALL, seed=1).double().forward_outputs(inputs, WORDS)
    assert outputs["logits"].shape == (2, CLASSES, 16, 24)
    assert (outputs["full_logits"] - expected).abs().max() < 1e-10
    assert torch.equal(outputs["labels"], expected.argmax(dim=1))
    assert (other["full_logits"] - expected).abs().max() > 1e-2


def test_the_outputs_of_training_equal_both_heads_of_transformers(network, images):
    inputs = normalised(images, DeploySpec(image_size=CANVAS))
    theirs = transformers_upernet(network).double()
    labels = torch.randint(0, CLASSES, (2, *CANVAS), generator=torch.Generator().manual_seed(2))
    labels[0, :8] = NOT_COUNTED
    with torch.no_grad():
        expected = theirs(inputs[1:], labels=labels[1:]).loss  # one image: both take the mean over its pixels
        theirs_first = theirs(inputs[:1], labels=labels[:1]).loss
        losses = SMALL.loss(network.training_outputs(inputs), labels)
        nothing = SMALL.loss(network.training_outputs(inputs[:1]), torch.full((1, *CANVAS), NOT_COUNTED))
    assert torch.allclose(losses.double(), torch.stack([theirs_first, expected]), atol=1e-5)
    assert nothing.tolist() == [0.0]


def test_gradients_reach_every_parameter_in_training(images):
    network = create_model(TINY_TEST, CLASSES, task=SMALL).train()
    labels = torch.randint(0, CLASSES, (2, *CANVAS), generator=torch.Generator().manual_seed(2))
    SMALL.loss(network.training_outputs(images.float()), labels).mean().backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("layout", ["gpu", "cpu", "openvino"])
@pytest.mark.parametrize(
    "left_out", [(), ("lateral-affine", "gathered-resize"), ("downsample-affine", "norm-affine", "grn-gain")]
)
def test_the_deploy_form_is_exact(network, images, layout, left_out):
    spec = DeploySpec("fp64", CANVAS, layout=layout, leave_out=left_out, outputs=WORDS)
    deployed = deploy_form(network, spec)
    with torch.no_grad():
        expected = network.forward_outputs(normalised(images, spec), WORDS)
        outputs = deployed(images)
        for name, output in outputs.items():
            assert (output - expected[name]).abs().max() < 1e-11, name
        layer = deployed.decode_head.lateral_convs[1]
        layer.bias[0] += 1e-3
        assert (deployed(images)["logits"] - expected["logits"]).abs().max() > 1e-7


def test_a_backbone_of_version_1_has_the_same_head(images):
    network = random_model(TINY_V1_TEST, CLASSES, task=SMALL).double()
    spec = DeploySpec("fp64", CANVAS, layout="gpu")
    with torch.no_grad():
        expected = network(normalised(images, spec))
        assert (deploy_form(network, spec)(images) - expected).abs().max() < 1e-11


def test_the_affine_of_the_last_norm_is_kept_because_a_padded_convolution_reads_it(network, images):
    """Folded like the others it would be wrong at the edge, where the padding has no shift."""
    deployed = deploy_form(network, DeploySpec("fp64", CANVAS))
    assert deployed.norm3.gain is not None
    assert deployed.norm0.gain is deployed.norm1.gain is deployed.norm2.gain is None


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 23), width=st.integers(1, 23), grid=st.integers(1, 8))
def test_the_constant_products_equal_torchs_pooling_and_resizing(height, width, grid):
    images = torch.randn(1, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(grid))
    pooled = images.flatten(2) @ pooling_matrix((height, width), grid)
    assert torch.allclose(pooled, F.adaptive_avg_pool2d(images, grid).flatten(2), atol=1e-12)
    cells = torch.randn(1, 2, grid, grid, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    back = cells.flatten(2) @ bilinear_matrix((grid, grid), (height, width))
    assert torch.allclose(
        back, F.interpolate(cells, (height, width), mode="bilinear", align_corners=False).flatten(2), atol=1e-12
    )


def test_a_canvas_has_one_size_that_32_divides(network):
    with pytest.raises(InputError, match="224x256"):
        deploy_form(network, DeploySpec(image_size=(200, 256)))
    with pytest.raises(InputError, match="GRN sums over all of it"):
        deploy_form(network, DeploySpec(image_size=64, size_range=(64, 128)))


def test_padding_is_not_neutral_so_the_canvas_is_the_models(network, images):
    larger = F.pad(images, (0, 96, 0, 64))
    with torch.no_grad():
        alone = network.forward_outputs(images)["logits"]
        padded = network.forward_outputs(larger)["logits"][..., :16, :24]
    assert (padded - alone).norm() / alone.norm() > 0.05


@pytest.mark.parametrize("values", [{"channels": 0}, {"pool_scales": []}, {"chanels": 8}, {"channels": "wide"}])
def test_wrong_options_of_the_task_are_refused(values):
    with pytest.raises(InputError, match=next(iter(values))):
        find_task("segment").configured(values)


def test_a_checkpoint_keeps_the_options_of_the_task(tmp_path, network):
    path = save_checkpoint(tmp_path / "own.safetensors", network.float(), class_names=list("abcde"))
    loaded = load_checkpoint(path)
    assert (loaded.model.task.name, loaded.model.task.options) == ("segment", {"channels": 16, "auxiliary_channels": 8})
    assert loaded.class_names == tuple("abcde")
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.float()), name
    network.double()


def test_a_classifiers_weights_start_a_segmentation_network(tmp_path):
    classifier = random_model(TINY_TEST, 7)
    path = save_checkpoint(tmp_path / "classifier.safetensors", classifier)
    with pytest.raises(CheckpointError, match="no segment head"):
        load_checkpoint(path, task="segment")
    loaded = load_checkpoint(path, task="segment", reset_head=True, num_classes=4, task_options={"channels": 16})
    assert torch.equal(loaded.model.stages[3][0].pwconv1.weight, classifier.stages[3][0].pwconv1.weight)
    assert loaded.model.decode_head.conv_seg.weight.shape == (4, 16, 1, 1)
    assert any("norm and head are left out" in note for note in loaded.notes)
    again = load_checkpoint(path, task="segment", reset_head=True, num_classes=4, task_options={"channels": 16})
    assert again.weights.sha256 == loaded.weights.sha256


def test_new_classes_keep_the_rest_of_the_head(tmp_path, network):
    path = save_checkpoint(tmp_path / "own.safetensors", network.float())
    loaded = load_checkpoint(path, reset_head=True, num_classes=9)
    assert loaded.model.num_classes == 9
    kept = "decode_head.fpn_bottleneck.conv.weight"
    assert torch.equal(loaded.model.state_dict()[kept], network.state_dict()[kept])
    network.double()


MAPS = OutputSpec("logits", (3, 32, 32), "logit", "softmax")


def test_differences_of_maps_count_a_decision_at_each_place():
    reference = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reference[1, 0, 0, :3] += 8.0
    near = reference + 1e-4 * torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))
    found = differences(near, reference, MAPS)
    assert (found.samples, found.top1_agreement) == (2, 1.0)
    assert not SMALL.gate(GATES["fp16"]).failures(found)
    wrong = reference.clone()
    wrong[1, :2, 0, :3] = wrong[1, :2, 0, :3].flip(0)  # three places of 2,048, by a large margin
    found = differences(wrong, reference, MAPS)
    assert (found.flips, found.excused_flips) == (3, 0)
    assert found.top1_agreement == pytest.approx(1.0 - 2 / 2048)
    assert any("top-1" in text for text in SMALL.gate(GATES["fp16"]).failures(found))


def test_labels_are_compared_by_the_references_scores_of_them():
    scores = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    specs = [OutputSpec("labels", (8, 8), "class", dtype="int64", indexes="full_logits")]
    labels = scores.argmax(dim=1)
    wrong = labels.clone()
    wrong[0, 2, 2] = (wrong[0, 2, 2] + 1) % 3
    reference = {"labels": labels, "full_logits": scores}
    for own, is_same in ((labels, True), (wrong, False), (torch.full_like(labels, 3), False)):
        ours, theirs = comparable({"labels": own}, reference, specs)
        assert torch.equal(ours["labels"], theirs["labels"]) is is_same


@pytest.mark.parametrize("layout", ["gpu", "cpu", "openvino"])
def test_the_label_map_takes_the_first_of_equal_classes(layout):
    spec = DeploySpec("fp32", CANVAS, layout=layout, outputs=("labels",))
    logits = torch.randn(2, CLASSES, 16, 24, generator=torch.Generator().manual_seed(0))
    logits[0, 2], logits[0, 4] = 9.0, 9.0
    expected = F.interpolate(logits, CANVAS, mode="bilinear", align_corners=False)
    found = LabelMap(CLASSES, spec)(logits)
    assert found.dtype == torch.int64
    assert bool((found[0] == 2).all())
    agreeing = found[1] == expected[1].argmax(dim=0)
    best = expected[1].topk(2, dim=0).values
    assert bool((agreeing | (best[0] - best[1] < 1e-5)).all())


def test_the_label_map_of_no_number_is_no_class():
    spec = DeploySpec("fp16", CANVAS, outputs=("labels",))
    logits = torch.zeros(1, CLASSES, 16, 24, dtype=torch.float16)
    logits[0, 1, 3, 4] = torch.nan
    found = LabelMap(CLASSES, spec)(logits)
    assert int(found[0, 14, 18]) == CLASSES
    assert int(found[0, 40, 60]) == 0
