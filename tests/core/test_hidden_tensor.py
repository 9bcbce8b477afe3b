"""Where a stage's hidden tensor is stored and where it is computed twice: worked cases of the rule."""

import pytest

from cnx_deploy.core.devices import DEVICES, TYPICAL, find_device, typical_device
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.hidden_tensor import hidden_by_stage, hidden_of_stage
from cnx_deploy.core.variants import VARIANTS

ATTO, TINY = VARIANTS["atto"].dims, VARIANTS["tiny"].dims


def test_the_rule_turns_where_the_arithmetic_of_recomputing_costs_more_than_the_bytes() -> None:
    """RTX 4090: r = 0.6 · 165.2 TFLOPS / 1008 GB/s = 98.3; 22 bytes stored against 24 C / r from C = 37 on."""
    card = find_device("RTX 4090")
    assert [hidden_of_stage(channels, card) for channels in (40, 80, 90, 91, 96)] == ["recomputed"] * 3 + ["stored"] * 2


def test_a_card_with_more_arithmetic_a_byte_recomputes_more() -> None:
    choices = {name: hidden_by_stage("auto", ATTO, "sm89", find_device(name)) for name in ("RTX 4090", "L4")}
    assert choices == {
        "RTX 4090": ["recomputed", "recomputed", "stored", "stored"],
        "L4": ["recomputed", "recomputed", "recomputed", "stored"],
    }


def test_without_a_card_the_typical_one_of_the_target_decides_and_of_an_unknown_target_all_is_stored() -> None:
    assert hidden_by_stage("auto", ATTO, "sm89") == hidden_by_stage("auto", ATTO, "", find_device("RTX 4090"))
    assert typical_device("sm121") is None
    assert hidden_by_stage("auto", ATTO, "sm121") == ["stored"] * 4


def test_every_typical_card_is_in_the_table_under_its_capability() -> None:
    found = {target: typical_device(target) for target in TYPICAL}
    assert {target: device.compute_capability for target, device in found.items() if device} == {t: t for t in TYPICAL}
    assert set(found.values()) <= set(DEVICES)


def test_a_mode_that_is_named_holds_wherever_it_can() -> None:
    assert hidden_by_stage("stored", ATTO, "sm89") == ["stored"] * 4
    assert hidden_by_stage("recomputed", ATTO, "sm89") == ["recomputed"] * 3 + ["stored"]
    assert hidden_by_stage("recomputed", TINY, "sm121") == ["recomputed", "stored", "stored", "stored"]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"'never' is no way .* auto, stored, recomputed"):
        hidden_by_stage("never", ATTO, "sm89")  # type: ignore[arg-type]
