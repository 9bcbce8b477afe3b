"""Fixtures that every test file shares: the smallest network that has every part of the real ones."""

import pytest

from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.variants import Variant

TINY_TEST = Variant("tiny-test", (1, 1, 2, 1), (8, 16, 32, 64), 138_104, 0.0)


@pytest.fixture(scope="session")
def tiny_variant() -> Variant:
    """Four stages, one with two blocks; 138,104 parameters with 1000 classes."""
    return TINY_TEST


@pytest.fixture
def tiny_model(tiny_variant: Variant) -> ConvNeXtV2:
    """Ten classes, evaluation mode, every parameter random and non-zero (seed 0); a fresh copy for each test."""
    return random_model(tiny_variant, 10, seed=0)
