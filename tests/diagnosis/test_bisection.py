"""The smallest set of modules in FP32: found for faults that are planted, and shown to be minimal."""

import itertools
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.diagnosis.bisect import CachedProbes, form_judge
from cnx_deploy.diagnosis.images import raw_batches
from cnx_deploy.diagnosis.mixed_precision import Case, MixedForm, Probe, RecordedProbe, RoundedOperators, case_of
from cnx_deploy.diagnosis.search import (
    find_kept,
    in_order,
    minimal_set,
    smallest_subset,
    units_of,
)
from cnx_deploy.model.checkpoint import LoadedModel
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import BLOCK_PARTS, parts_of
from cnx_deploy.verification.parity import differences
from tests.conftest import Command
from tests.support.faulty_networks import DEEP, FAULTS, HIDDEN_2_3, NO_WEIGHTS, RUN, SIZE, case_with, faulty
from tests.support.pictures import smooth_pictures

UNITS = units_of(DEEP)


def tried_on(case: Case) -> CachedProbes:
    """Nothing is known before: as of a file that keeps something."""
    logits = case.expected["logits"]
    recorded = RecordedProbe(Probe(("head",), differences(logits, logits), (), exported=True), None, ())
    return CachedProbes(form_judge(case), recorded, case.units, lambda _: None)


# The search alone


def searched(count: int, wanted: Collection[int]) -> tuple[bool, int]:
    """Whether the units of `wanted` are found, and the checks made, that everything passes being one of them."""
    units, needed, asked = [str(index) for index in range(count)], {str(index) for index in wanted}, set()

    def passes(kept: Collection[str]) -> bool:
        asked.add(frozenset(kept))
        return needed <= set(kept)

    assert passes(units)
    return set(minimal_set(units, passes)) == needed, len(asked)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 14, 17, 36, 64])
def test_one_fault_is_found_anywhere_in_log2_and_two_probes(count: int) -> None:
    bound = math.ceil(math.log2(count)) + 2
    assert all(found and probes <= bound for found, probes in (searched(count, [at]) for at in range(count)))


def test_two_faults_and_runs_of_neighbours_are_found_with_few_probes() -> None:
    log = math.ceil(math.log2(36))
    for pair in itertools.combinations(range(36), 2):
        found, probes = searched(36, pair)
        assert (found, probes <= 3 * log + 5) == (True, True)
    for start, length in itertools.product(range(20), range(2, 17)):
        found, probes = searched(36, range(start, start + length))
        assert (found, probes <= 3 * length + log + 8) == (True, True)


def test_where_errors_add_up_the_set_passes_and_lacks_nothing_that_can_be_spared() -> None:
    units, share = [str(index) for index in range(12)], [5, 1, 1, 8, 1, 3, 3, 1, 9, 1, 1, 2]

    def passes(kept: Collection[str]) -> bool:
        return sum(share[int(unit)] for unit in kept) >= 20

    found = minimal_set(units, passes)
    assert passes(found)
    assert not any(passes([other for other in found if other != unit]) for unit in found)


def test_a_member_that_turns_out_to_be_spared_is_left_out() -> None:
    enough = [{"0", "1", "2", "3"}, {"0", "1", "2"}, {"1", "2"}, {"1"}]  # with 0 and without 2, 1 is not enough
    assert minimal_set(("0", "1", "2", "3"), lambda kept: set(kept) in enough) == ("1",)


def test_nothing_is_kept_where_nothing_is_enough() -> None:
    assert find_kept(UNITS, lambda _: True) == ()
    assert find_kept(UNITS, lambda _: False) is None


def test_the_smallest_subset_is_smaller_than_what_leaving_out_one_by_one_would_give() -> None:
    enough = [{"grn", "pwconv1", "pwconv2"}, {"dwconv"}]

    def passes(kept: Collection[str]) -> bool:
        return any(each <= set(kept) for each in enough)

    assert smallest_subset(BLOCK_PARTS, (), passes) == ("dwconv",)
    assert smallest_subset(BLOCK_PARTS[1:], (), passes) == ("pwconv1", "grn", "pwconv2")
    assert smallest_subset(BLOCK_PARTS[2:], (), passes) is None
    assert smallest_subset(BLOCK_PARTS[2:], ("dwconv",), passes) == ()


# Names


def test_units_and_their_parts_are_all_that_can_be_kept_in_order_of_depth() -> None:
    assert sorted(parts_of(DEEP)) == sorted(
        name for unit in UNITS for name in (unit, *(f"{unit}.{part}" for part in BLOCK_PARTS if unit[0] == "s"))
    )
    assert in_order(("head", *RUN[::-1], *HIDDEN_2_3[::-1]), UNITS)[2:5] == ("stages.2.3", *HIDDEN_2_3)


# On the form


@pytest.mark.parametrize(
    "fault",
    [fault if fault in ("hidden", "head", "two", "run and block") else pytest.param(fault, marks=pytest.mark.slow)
     for fault in FAULTS],
)  # fmt: skip
def test_a_planted_fault_is_found_by_name_and_nothing_of_it_can_be_spared(fault: str) -> None:
    _, expected, units = FAULTS[fault]
    tried = tried_on(case_with(faulty(fault)))
    assert not tried.passes(())
    assert find_kept(UNITS, tried.passes) == expected
    assert tried.passes(expected)
    assert not any(tried.passes([other for other in expected if other != name]) for name in expected)
    by_units = [probe for probe in tried.probes.values() if probe.kept and set(probe.kept) <= set(UNITS)]
    log = math.ceil(math.log2(len(UNITS)))
    assert len(by_units) <= {1: log + 3, 2: 3 * log + 5}.get(units, 3 * units + 3 * log)


def test_the_faults_are_of_the_kinds_they_stand_for() -> None:
    finite = {name: tried_on(case_with(faulty(name))).probe(()).found.all_finite for name in FAULTS}
    assert [name for name, is_finite in finite.items() if is_finite] == ["inaccurate"]
    infinite = {name: infinite_in_half(faulty(name)) for name in FAULTS}
    assert infinite.pop("infinite weight") == ["stages.2.2.pwconv2"]
    assert {name for name, modules in infinite.items() if modules} == {"head", "run", "run and block"}


def infinite_in_half(model: ConvNeXtV2) -> list[str]:
    """Modules with parameters that are numbers in FP32 and none in FP16."""
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    wrong = (name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter.half()).all()))
    return list(dict.fromkeys(name.rpartition(".")[0] for name in wrong))


def test_a_fault_is_found_in_the_layout_for_cpus_too() -> None:
    assert find_kept(UNITS, tried_on(case_with(faulty("hidden"), layout="cpu")).passes) == HIDDEN_2_3


def test_in_bf16_what_overflows_in_fp16_needs_nothing() -> None:
    probe = form_judge(case_with(faulty("hidden"), "bf16"))(())
    assert probe.found.all_finite
    assert probe.found.relative_l2_max < 0.16, "BF16's own noise is 0.02 to 0.04 here, and what overflows is far off"


def test_a_probe_leaves_no_trace_in_the_next(tiny_model: ConvNeXtV2) -> None:
    case = case_with(tiny_model)
    form = MixedForm(case.loaded.model, case.spec.deploy)
    block, part_first = ("stages.2.0",), ("stages.2.0.grn", "stages.2.0")
    nothing, kept, both, again, after = (
        form.outputs(case.batches, each)["logits"] for each in ((), block, part_first, block, ())
    )
    assert torch.equal(nothing, after)
    assert torch.equal(kept, both)
    assert torch.equal(kept, again)
    assert not torch.equal(nothing, kept)


def test_a_linear_layer_over_tokens_rounds_its_product_before_its_bias_as_the_file_does() -> None:
    ones, weight, bias = torch.ones(1, 2, 2).half(), torch.full((1, 2), 4e4).half(), torch.full((1,), -29952.0).half()
    with torch.inference_mode(), RoundedOperators():
        tokens, pooled = F.linear(ones, weight, bias), F.linear(ones[0], weight, bias)
    assert (tokens.dtype, pooled.dtype) == (torch.float16, torch.float16)
    assert bool(torch.isinf(tokens).all())
    assert pooled.flatten().tolist() == [50048.0, 50048.0]  # a Gemm, which rounds once


def test_a_form_that_is_not_of_half_precision_has_nothing_to_keep(tiny_model: ConvNeXtV2) -> None:
    with pytest.raises(InputError, match="not in fp32"):
        MixedForm(tiny_model, DeploySpec("fp32", SIZE))


# Images


@pytest.mark.parametrize(
    ("batch", "samples", "whole", "sizes"),
    [
        ((1, 4, 64), 4, False, [4]), ((1, 4, 64), 11, False, [8, 3]), ((8, 8, 8), 4, False, [8]),
        ((3, 4, 5), 7, False, [5, 3]), ((1, 4, 64), 11, True, [8, 8]), ((1, 2, 4), 2, True, [2]),
    ],
)  # fmt: skip
def test_images_come_in_batches_that_the_file_takes(
    tiny_onnx_fp16: Artifact, batch: tuple[int, int, int], samples: int, whole: bool, sizes: list[int]
) -> None:
    request = replace(tiny_onnx_fp16.manifest.request, batch=batch)
    manifest = replace(tiny_onnx_fp16.manifest, request=request)
    assert [len(images) for images in raw_batches(manifest, samples, None, whole=whole)] == sizes


def test_every_diagnosis_reads_twelve_bits_by_a_white_level(
    tiny_onnx_fp16: Artifact, cnx: Command, tmp_path: Path
) -> None:
    """The same picture with 12 bits in 16: by the white level its pixels are those of the picture with 8."""
    eight = np.asarray(smooth_pictures([(40, 36)])[0].convert("L"))
    for folder, pixels in (("eight", eight), ("deep", np.round(eight * (4095 / 255)).astype(np.uint16))):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    plain, dark, scaled = (
        raw_batches(tiny_onnx_fp16.manifest, 1, tmp_path / folder, white_level=level)[0]
        for folder, level in (("eight", None), ("deep", None), ("deep", 4095))
    )
    assert torch.equal(plain, scaled)
    assert not torch.equal(plain, dark)
    words = (tiny_onnx_fp16.path, "--data", tmp_path / "deep", "--samples", 1)
    assert "--white-level 4095" in cnx("diagnose", "bisect", *words)[2]
    assert "white" not in cnx("diagnose", "bisect", *words, "--white-level", 4095)[2]
    for command in ("layers", "bisect", "chain"):  # what no file holds is refused before the work
        code, _, err = cnx("diagnose", command, *words, "--white-level", 1e12)
        assert (code, "at most 2^32, got 1000000000000" in err) == (2, True)


def test_a_folder_gives_the_images(tiny_onnx_fp16: Artifact, tiny_model: ConvNeXtV2, tmp_path: Path) -> None:
    for index in range(3):
        Image.new("RGB", (40, 40), (80 * index, 10, 200)).save(tmp_path / f"{index}.png")
    case = case_of(tiny_onnx_fp16, LoadedModel(tiny_model, NO_WEIGHTS), GATES["fp16"], tmp_path, 4)
    assert len(case.expected["logits"]) == 3
    (batch,) = raw_batches(tiny_onnx_fp16.manifest, 4, tmp_path, whole=True)
    assert torch.equal(batch[:3], case.batches[0])
    assert torch.equal(batch[3], batch[0])
