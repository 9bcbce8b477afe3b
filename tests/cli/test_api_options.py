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
