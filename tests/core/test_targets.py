"""The GPU to build for, by compute capability or by name."""

import pytest

from cnx_deploy.core.devices import DEVICES
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.targets import GPUS, find_target
from tests.conftest import Command


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("current", "current"), ("sm89", "sm89"), ("SM_120", "sm120"), ("8.9", "sm89"), ("12.1", "sm121"),
        ("rtx4090", "sm89"), ("RTX 4090", "sm89"), ("NVIDIA GeForce RTX 4090 Laptop GPU", "sm89"),
        ("rtx3060ti", "sm86"), ("RTX 4070 Ti SUPER", "sm89"), ("L4", "sm89"), ("Tesla T4", "sm75"),
        ("a100", "sm80"), ("NVIDIA A100-SXM4-80GB", "sm80"), ("H100", "sm90"), ("jetson-orin-nano", "sm87"),
        ("NVIDIA RTX 6000 Ada Generation", "sm89"), ("Quadro RTX 6000", "sm75"), ("A10", "sm86"),
    ],
)  # fmt: skip
def test_a_gpu_is_found_as_people_and_drivers_write_it(text: str, target: str) -> None:
    assert find_target(text) == target


def test_the_roofline_table_and_every_name_agree_with_it() -> None:
    assert {device.name: find_target(device.name) for device in DEVICES} == {
        device.name: device.compute_capability for device in DEVICES
    }
    for target, names in GPUS.items():
        assert {find_target(name) for name in names} == {target}


@pytest.mark.parametrize("text", ["rtx9090", "RTX 6000", "A1000", "L400", "sm1", "89", "", "nvidia", "x" * 1000])
def test_what_names_no_gpu_or_several_is_refused_with_names_that_do(text: str) -> None:
    with pytest.raises(InputError, match=r"RTX 4090 is sm89, .*A100 is sm80, .*Jetson Orin is sm87") as refusal:
        find_target(text)
    assert len(str(refusal.value)) < 600


def test_commands_take_names_and_refuse_others_before_the_work(cnx: Command) -> None:
    for words in (("build-trt", "absent.onnx"), ("inspect", "absent.onnx", "--compile")):
        code, _, err = cnx(*words, "--target", "rtx9090")
        assert (code, "RTX 4090 is sm89" in err, "absent" in err) == (2, True, False)
        code, _, err = cnx(*words, "--target", "rtx4090")
        assert (code, "absent.onnx" in err) == (2, True)
