import math
from pathlib import Path

import pytest
import torch

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.variants import VARIANTS, find_variant
from cnx_deploy.model.convnextv2 import create_model
from cnx_deploy.training import RECIPES, Launch, TrainingSpec, recipe_options, spec_from_recipe
from cnx_deploy.training.optimisation import (
    cosine_with_warmup,
    layer_count,
    layer_index,
    make_optimizer,
    make_schedule,
    parameter_groups,
)

DATA = Path("images")

# arXiv:2301.00808, tables 9 to 11: epochs, base rate, weight and layer decay, warm-up, smoothing, mixup, cutmix, drop
FINE_TUNE_TABLES = {
    "atto": (600, 2e-4, 0.3, 0.9, 0, 0.2, 0.0, 0.0, 0.1),
    "femto": (600, 2e-4, 0.05, 0.9, 0, 0.2, 0.3, 0.3, 0.0),
    "pico": (600, 2e-4, 0.3, 0.9, 0, 0.2, 0.3, 0.3, 0.0),
    "nano": (600, 2e-4, 0.3, 0.9, 0, 0.2, 0.5, 0.5, 0.1),
    "tiny": (300, 8e-4, 0.05, 0.9, 40, 0.1, 0.8, 1.0, 0.2),
    "base": (100, 6.25e-4, 0.05, 0.6, 20, 0.1, 0.8, 1.0, 0.1),  # the rate of TRAINING.md
    "large": (100, 6.25e-4, 0.05, 0.6, 20, 0.1, 0.8, 1.0, 0.2),
    "huge": (50, 1.25e-3, 0.05, 0.75, 10, 0.1, 0.8, 1.0, 0.3),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_fine_tuning_has_the_papers_figures(variant):
    spec = spec_from_recipe(DATA, variant, "fine-tune")
    found = (
        spec.epochs, spec.base_learning_rate, spec.weight_decay, spec.layer_decay, spec.warmup_epochs,
        spec.label_smoothing, spec.mixup_alpha, spec.cutmix_alpha, spec.drop_path_rate,
    )  # fmt: skip
    assert found == FINE_TUNE_TABLES[variant]
    assert (spec.images_per_step, spec.ema_decay, spec.head_init_scale) == (1024, 0.9999, 0.001)
    assert (spec.randaugment_magnitude, spec.erasing_probability) == (9.0, 0.25)
    assert spec.layer_decay_groups == ("group" if variant in ("base", "large", "huge") else "single")


def test_training_from_scratch_has_the_v1_papers_figures():
    spec = spec_from_recipe(DATA, "base", "from-scratch")
    assert (spec.images_per_step, spec.resolved_learning_rate) == (4096, pytest.approx(4e-3))
    assert (spec.epochs, spec.warmup_epochs, spec.drop_path_rate, spec.layer_decay) == (300, 20.0, 0.5, 1.0)
    assert spec_from_recipe(DATA, "tiny", "from-scratch").drop_path_rate == 0.1


def test_the_articles_recipe_is_plain_sgd_on_batches_of_four():
    spec = spec_from_recipe(DATA, "atto", "article")
    assert (spec.optimizer, spec.resolved_learning_rate, spec.batch_size, spec.epochs) == ("sgd", 5e-3, 4, 30)
    assert (spec.label_smoothing, spec.weight_decay, spec.resolved_warmup_epochs) == (0, 0, 0)
    assert spec.schedule == "constant"


def test_the_plain_recipe_is_the_default_and_has_a_rate_for_each_optimiser():
    assert spec_from_recipe(DATA, "atto") == TrainingSpec(DATA, "atto")
    rates = {name: TrainingSpec(DATA, "atto", optimizer=name).resolved_learning_rate for name in ("adamw", "sgd")}
    assert rates == {"adamw": 1e-3, "sgd": 5e-3}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_recipe_gives_every_variant_a_request_that_holds(recipe, variant):
    assert set(recipe_options(recipe, variant)) <= set(TrainingSpec.__dataclass_fields__)
    assert spec_from_recipe(DATA, variant, recipe).recipe == recipe


def test_an_unknown_recipe_is_refused():
    with pytest.raises(InputError, match="plain, fine-tune, from-scratch, article"):
        spec_from_recipe(DATA, "atto", "fast")


def test_a_given_option_takes_the_place_of_the_recipes():
    spec = spec_from_recipe(DATA, "tiny", "fine-tune", label_smoothing=0.0, epochs=30)
    assert (spec.label_smoothing, spec.mixup_alpha, spec.epochs) == (0.0, 0.8, 30)
    assert spec.warmup_epochs == pytest.approx(4.0)  # 40 of 300
    assert spec_from_recipe(DATA, "tiny", "fine-tune", epochs=30, warmup_epochs=1.0).warmup_epochs == 1.0


def test_a_given_rate_takes_the_place_of_the_recipes_and_a_base_rate_is_scaled_to_all_images_of_a_step():
    assert spec_from_recipe(DATA, "tiny", "fine-tune", learning_rate=1e-3).resolved_learning_rate == 1e-3
    given = spec_from_recipe(DATA, "atto", "article", base_learning_rate=0.32)
    assert given.resolved_learning_rate == pytest.approx(0.32 * 4 / 256)
    spec = spec_from_recipe(DATA, "atto", "fine-tune", batch_size=32, accumulate=2, launch=Launch(0, 4, 2))
    assert (spec.images_per_step, spec.resolved_learning_rate) == (512, pytest.approx(4e-4))


@pytest.mark.parametrize(
    ("name", "single", "group"),
    [
        ("downsample_layers.0.0.weight", 1, 0),
        ("downsample_layers.1.1.weight", 4, 2),
        ("downsample_layers.3.1.bias", 34, 12),
        ("stages.0.2.pwconv1.weight", 3, 1),
        ("stages.1.0.grn.gamma", 4, 2),
        ("stages.2.0.norm.bias", 7, 3),
        ("stages.2.26.dwconv.weight", 33, 11),
        ("stages.3.1.pwconv2.bias", 35, 12),
        ("norm.weight", 37, 13),
        ("head.weight", 37, 13),
    ],
)
def test_layers_are_numbered_as_in_the_reference_code(name, single, group):
    base = find_variant("base")
    assert (layer_index(name, base, "single"), layer_index(name, base, "group")) == (single, group)
    assert (layer_count(base, "single"), layer_count(base, "group")) == (37, 13)


def test_layer_decay_slows_the_first_layers_most(tiny_variant):
    spec = TrainingSpec(DATA, tiny_variant, learning_rate=0.1, layer_decay=0.5, weight_decay=0.0)
    model = create_model(tiny_variant, 2)
    optimizer = make_optimizer(model, spec)
    rate_of = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    assert rate_of[id(named["head.weight"])] == pytest.approx(0.1)
    assert rate_of[id(named["stages.3.0.dwconv.weight"])] == pytest.approx(0.05)
    assert rate_of[id(named["stages.0.0.dwconv.weight"])] == pytest.approx(0.1 * 0.5**5)
    assert len(rate_of) == len(named)


def test_the_schedule_moves_every_group_by_the_same_factor_and_ends_at_the_final_rate(tiny_variant):
    spec = TrainingSpec(
        DATA, tiny_variant, learning_rate=0.1, final_learning_rate=1e-4, layer_decay=0.5, epochs=10, warmup_epochs=1.0
    )
    optimizer = make_optimizer(create_model(tiny_variant, 2), spec)
    schedule = make_schedule(optimizer, spec, 100)
    first = sorted({group["lr"] for group in optimizer.param_groups})
    assert (first[0], first[-1]) == (pytest.approx(0.1 / 11 * 0.5**5), pytest.approx(0.1 / 11))
    factor = schedule.lr_lambdas[0]
    assert (factor(100) * 0.1, factor(55) * 0.1) == (pytest.approx(1e-4), pytest.approx((0.1 + 1e-4) / 2))
    spec = TrainingSpec(DATA, tiny_variant, schedule="constant")
    schedule = make_schedule(make_optimizer(create_model(tiny_variant, 2), spec), spec, 50)
    assert {schedule.lr_lambdas[0](step) for step in (0, 25, 50)} == {1.0}


def test_the_learning_rate_rises_linearly_then_falls_as_half_a_cosine():
    factor = cosine_with_warmup(100, 10, 0.01)
    assert [factor(step) for step in (0, 4, 10)] == pytest.approx([1 / 11, 5 / 11, 1.0])
    assert factor(55) == pytest.approx(0.505)
    assert factor(100) == pytest.approx(0.01)
    assert factor(32.5) == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_norms_biases_and_grn_have_no_weight_decay(tiny_model):
    decayed, kept = parameter_groups(tiny_model, 0.05)
    names = {parameter: name for name, parameter in tiny_model.named_parameters()}
    kept_names = [names[parameter] for parameter in kept["params"]]
    decayed_names = [names[parameter] for parameter in decayed["params"]]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    assert {name for name in names.values() if "norm" in name or "bias" in name or "grn" in name} <= set(kept_names)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert "stages.0.0.dwconv.weight" in decayed_names
    assert len(kept_names) + len(decayed_names) == len(names)


def test_momenta_reach_the_optimiser(tiny_variant):
    model, spec = create_model(tiny_variant, 2), TrainingSpec(DATA, tiny_variant, beta2=0.95)
    assert make_optimizer(model, spec).param_groups[0]["betas"] == (0.9, 0.95)
    sgd = make_optimizer(model, TrainingSpec(DATA, tiny_variant, optimizer="sgd"))
    assert (type(sgd), sgd.param_groups[0]["momentum"]) == (torch.optim.SGD, 0.9)
