"""Options of the Python API that do not exist are refused with what is meant."""

import pytest

import cnx_deploy as cnx
from cnx_deploy.core.errors import InputError


def test_an_unknown_option_is_refused_with_the_one_that_is_meant():
    with pytest.raises(InputError, match="did you mean duration_seconds"):
        cnx.benchmark("none.onnx", duration=1.0)
    with pytest.raises(InputError, match=r"'sizes'.*image_size"):
        cnx.export("tiny-test", sizes=3)


@pytest.mark.parametrize("size", ["224", 224.0, (3, 224, 224), (16, 64)])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(InputError, match="image size"):
        cnx.export("tiny-test", image_size=size)


@pytest.mark.parametrize("option", ["keep_fp32", "leave_out", "outputs"])
def test_one_word_is_taken_as_a_word_and_not_as_its_letters(option):
    with pytest.raises(InputError, match="nonsense"):
        cnx.export("tiny-test", image_size=32, no_verify=True, **{option: "nonsense"})


def test_of_a_benchmark_one_peer_is_taken_as_a_word():
    with pytest.raises(InputError, match="got 'nonsense'"):
        cnx.benchmark("none.onnx", compare="nonsense")


def test_values_of_other_types_are_refused_in_words(tiny_onnx_fp16, tmp_path):
    with pytest.raises(InputError, match=r"A target is one name, such as 'sm89', not \('sm89', 'sm86'\)"):
        cnx.build_engine(tiny_onnx_fp16, target=("sm89", "sm86"), output_dir=tmp_path)
    with pytest.raises(InputError, match="fused is True; expected auto, stored, recomputed or None"):
        cnx.build_engine(tiny_onnx_fp16, target="sm89", fused=True, output_dir=tmp_path)
    with pytest.raises(InputError, match="calibration is a list; expected the path"):
        cnx.export("tiny-test", precision="int8", calibration=["a.png"], output_dir=tmp_path)
