"""The comparison of two ways of training: equal settings, honest statistics, finished runs kept."""

import importlib.util
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats

from tests.support.training_data import write_colours

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare.py"


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def concluded(compare, first, second, folder, capsys) -> tuple[dict, str]:
    sides = {name: [[value] for value in values] for name, values in (("old", first), ("new", second))}
    compare.conclude("test", sides, {}, folder / "found.json")
    return json.loads((folder / "found.json").read_text()), capsys.readouterr().out


@pytest.mark.parametrize("seeds", [2, 5, 10])
def test_the_interval_is_that_of_a_paired_t_test(compare, tmp_path, capsys, seeds):
    generator = np.random.default_rng(seeds)
    first, second = generator.normal(90, 2, seeds), generator.normal(91, 2, seeds)
    found, _ = concluded(compare, tuple(first), tuple(second), tmp_path, capsys)
    low, high = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert found["difference"]["mean"] == pytest.approx((low + high) / 2)
    assert found["difference"]["half_width_95"] == pytest.approx((high - low) / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ((95.0, 96.0, 97.1), "new is better"),
        ((85.0, 86.0, 87.1), "old is better"),
        ((91.0, 90.5, 92.5), "no difference"),
    ],
)
def test_a_difference_is_only_claimed_beyond_its_interval(compare, tmp_path, capsys, second, says):
    _, printed = concluded(compare, (90.0, 91.0, 92.0), second, tmp_path, capsys)
    assert says in printed
    assert all(f"{value:.2f}" in printed for value in second)


@pytest.mark.slow
def test_the_two_versions_are_trained_alike_and_finished_runs_are_kept(compare, tmp_path, monkeypatch):
    data, specs = write_colours(tmp_path / "colours"), []
    trained = compare.train

    def noted(spec, *others, **more):
        specs.append(spec)
        return trained(spec, *others, **more)

    monkeypatch.setattr(compare, "train", noted)
    words = ["v1-v2", str(data), "--seeds", "2", "--epochs", "1", "--image-size", "32"]
    words += ["--output-dir", str(tmp_path / "compared")]
    first = CliRunner().invoke(compare.main, words, catch_exceptions=False)
    alike = {replace(spec, variant="atto", run_dir=None, seed=0) for spec in specs}
    assert ([spec.variant for spec in specs], len(alike)) == (["v1-atto"] * 2 + ["atto"] * 2, 1)
    second = CliRunner().invoke(compare.main, words, catch_exceptions=False)
    assert (second.exit_code, second.stdout, len(specs)) == (0, first.stdout, 4)


@pytest.mark.slow
def test_few_labels_from_scratch_and_from_pre_training_see_the_same_images(compare, tmp_path, monkeypatch):
    data, seen = write_colours(tmp_path / "colours"), []
    trained = compare.train

    def noted(spec, initial, progress, dataset):
        seen.append((spec.seed, dataset.train.paths, initial is not None))
        return trained(spec, initial, progress, dataset=dataset)

    monkeypatch.setattr(compare, "train", noted)
    words = ["pretraining", str(data), "--seeds", "2", "--labels", "2", "--epochs", "1", "--pretraining-epochs", "1"]
    words += ["--image-size", "64", "--output-dir", str(tmp_path / "compared")]
    done = CliRunner().invoke(compare.main, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert [(seed, started) for seed, _, started in seen] == [(0, False), (0, True), (1, False), (1, True)]
    assert seen[0][1] == seen[1][1] != seen[2][1]
    assert len(seen[0][1]) == 4


@pytest.mark.slow
def test_every_other_class_is_thinned_out_alike_for_each_way_of_training(compare, tmp_path, monkeypatch):
    data, seen = write_colours(tmp_path / "colours", train=5), []
    trained = compare.train

    def noted(spec, initial, progress, dataset):
        seen.append((spec, Counter(dataset.train.labels), dataset.train.paths))
        return trained(spec, initial, progress, dataset=dataset)

    monkeypatch.setattr(compare, "train", noted)
    words = ["uneven", str(data), "--seeds", "2", "--rare", "2", "--epochs", "1", "--image-size", "32"]
    done = CliRunner().invoke(
        compare.main, [*words, "--output-dir", str(tmp_path / "compared")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert {tuple(sorted(counts.items())) for _, counts, _ in seen} == {((0, 5), (1, 2))}
    first, second = seen[: len(compare.UNEVEN)], seen[len(compare.UNEVEN) :]
    assert [spec.balancing for spec, *_ in first] == [spec.balancing for spec, *_ in second]
    assert len({paths for *_, paths in first}) == len({paths for *_, paths in second}) == 1
    assert first[0][2] != second[0][2]
    found = json.loads((tmp_path / "compared" / "uneven.json").read_text())
    assert [side["name"] for side in found["sides"]] == list(compare.UNEVEN)
    assert len(found["differences"]) == len(compare.UNEVEN) - 1
