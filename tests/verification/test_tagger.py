"""A tagger of 9,083 labels in timm's layout, with the table of its tags: exported in FP16 and compared with timm."""

import csv

import pytest
import timm
import torch

import cnx_deploy as cnx
from cnx_deploy.core.variants import find_variant
from tests.support.foreign_models import saved, timm_model

LABELS = 9083


@pytest.mark.parametrize(
    ("variant", "side", "fixed"),
    [("tiny-test", 64, False), ("base", 448, True)],
)
@pytest.mark.slow
def test_a_tagger_of_timm_gives_timms_probabilities_and_its_tags_by_name(variant, side, fixed, tmp_path):
    torch.manual_seed(0)
    if fixed:
        model = timm.create_model("convnextv2_base", num_classes=LABELS).eval()
    else:
        model = timm_model(find_variant(variant), LABELS)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".grn." in name:
                tensor.normal_(0.0, 0.5)
        model.head.fc.weight.normal_(0.0, 0.05)
        model.head.fc.bias.normal_(-2.5, 1.0)  # most tags are rare
    path = saved(model.state_dict(), tmp_path / "tagger.safetensors")
    with (tmp_path / "selected_tags.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["tag_id", "name", "category", "count"])
        rows.writerows([at, f"tag, {at}", 0, LABELS - at] for at in range(LABELS))
    notes: list[str] = []
    made = cnx.export(
        variant, checkpoint=path, task="multi-label", class_names=str(tmp_path / "selected_tags.csv"), image_size=side,
        mean=0.5, std=0.5, crop_ratio=1.0, batch=(1, 2, 4), output_dir=tmp_path / "export", note=notes.append,
    )  # fmt: skip
    record = made.manifest.model
    assert (record.task, record.num_classes, record.class_names[9082]) == ("multi-label", LABELS, "tag, 9082")
    assert (record.thresholds, any("threshold of each label is 0.5" in text for text in notes)) == (None, True)
    images = torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(1)) / 255.0
    with torch.inference_mode():
        expected = model((images - 0.5) / 0.5).sigmoid()
    with cnx.load(made) as opened:
        scores = opened.outputs(list(images))["probabilities"]
        (first, _) = opened.predict(list(images))
    assert float((scores - expected).norm() / expected.norm()) < 1.5e-2
    assert float((scores.roll(1, 1) - expected).norm() / expected.norm()) > 0.1
    given = [at for at in expected[0].argsort(descending=True).tolist() if float(scores[0, at]) >= 0.5]
    assert {score.name for score in first.scores} == {f"tag, {at}" for at in given}
    assert len(given) > 10
