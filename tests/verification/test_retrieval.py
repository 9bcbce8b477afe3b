"""What a search among embeddings makes of two runners, against scikit-learn's neighbours."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import cnx_deploy as cnx
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES, OutputSpec
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.data import image_like_batches
from cnx_deploy.model.tasks.base import Outputs
from cnx_deploy.runners.base import HoldsNothing, Runner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.verification import retrieval
from cnx_deploy.verification.metrics import RunningComparison
from cnx_deploy.verification.parity import NOISE_MARGIN
from cnx_deploy.verification.retrieval import Retrieval, RetrievalResult, RunningRetrieval
from cnx_deploy.verification.saved_results import judge_saved
from cnx_deploy.verification.verify import Candidate, Reference

COUNT, WIDTH = 60, 16


def embeddings(count: int = COUNT, seed: int = 0) -> Tensor:
    """Ten clusters, so that neighbours are no chance."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(10, WIDTH, generator=generator)
    return centres[torch.arange(count) % 10] + torch.randn(count, WIDTH, generator=generator)


def noise(like: Tensor, size: float, seed: int = 1) -> Tensor:
    return size * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def searched(
    candidate: Tensor, reference: Tensor, labels: list[int] | None = None, gate: str = "fp16"
) -> RetrievalResult:
    """The verdict, of batches of 1, 2 and 7 in turns."""
    count, at = len(reference), 0
    spec = OutputSpec("embedding", tuple(reference.shape[1:]), "embedding")
    comparison = RunningComparison([spec], [str(label) for label in range(10)] if labels else [])
    for size in [1, 2, 7] * count:
        here = slice(at, min(at + size, count))
        if here.start < count:
            names = [f"{index}.png" for index in range(count)[here]]
            sides = ({"embedding": candidate[here]}, {"embedding": reference[here]})
            comparison.add(*sides, names, labels[here] if labels else [])
        at += size
    (result,) = comparison.results(("candidate", "torch"), GATES[gate])
    assert isinstance(result, RetrievalResult)
    return result


def nearest(vectors: Tensor, k: int) -> np.ndarray:
    """(N, k) neighbours by scikit-learn, in float64, the query itself left out."""
    search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(vectors.double().numpy())
    return search.kneighbors(return_distance=False)


@pytest.mark.parametrize(("size", "seed"), [(0.0, 1), (0.05, 1), (0.5, 2), (3.0, 3)])
def test_overlap_and_recall_are_those_of_scikit_learns_neighbours(size: float, seed: int) -> None:
    reference = embeddings(seed=seed)
    candidate, labels = reference + noise(reference, size), [index % 10 for index in range(COUNT)]
    found = searched(candidate, reference, labels).retrieval
    assert [row.k for row in found.neighbours] == [1, 5, 10]
    for row in found.neighbours:
        ours, theirs = (nearest(side, row.k) for side in (candidate, reference))
        shared = [len(set(a) & set(b)) / row.k for a, b in zip(ours, theirs, strict=True)]
        first = [b[0] in a for a, b in zip(ours, nearest(reference, 1), strict=True)]
        assert row.overlap == pytest.approx(float(np.mean(shared)), abs=1e-12)
        assert row.recall == pytest.approx(float(np.mean(first)), abs=1e-12)
        for value, side in ((row.reference_labels, theirs), (row.candidate_labels, ours)):
            hits = [any(labels[other] == labels[at] for other in row) for at, row in enumerate(side)]
            assert value == pytest.approx(float(np.mean(hits)), abs=1e-12)
    assert (found.neighbours[0].overlap == 1.0) is (size == 0.0)


@pytest.mark.parametrize("queries", [7, 60, 512])
def test_rank_changes_and_their_margins_are_those_of_all_similarities(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "QUERIES", queries)
    reference = embeddings(40)
    candidate = reference + noise(reference, 0.2)
    found = searched(candidate, reference).retrieval
    sides = []
    for side in (candidate, reference):
        array = side.double().numpy()
        array /= np.linalg.norm(array, axis=1, keepdims=True)
        sides.append(array @ array.T)
    errors = (sides[0] - sides[1])[~np.eye(40, dtype=bool)]
    assert found.rms_error == pytest.approx(float(np.sqrt(np.mean(errors**2))), rel=1e-6)
    expected = {}
    for k in (1, 5, 10):
        for image, (ours, theirs) in enumerate(zip(nearest(candidate, k), nearest(reference, k), strict=True)):
            pairs = {(a, b): sides[1][image, a] - sides[1][image, b] for a in set(theirs) - set(ours)
                     for b in set(ours) - set(theirs)}  # fmt: skip
            if pairs:
                (lost, gained), margin = max(pairs.items(), key=lambda pair: pair[1])
                expected[k, f"{image}.png"] = (f"{lost}.png", f"{gained}.png", pytest.approx(float(margin), abs=1e-9))
    assert {(each.k, each.image): (each.lost, each.gained, each.margin) for each in found.changes} == expected
    assert (found.changed, found.unexcused) == (len(expected), sum(not each.excused for each in found.changes))


def rotated(vectors: Tensor, degrees: float) -> Tensor:
    """The first half of the values turned in planes with the second half, for every other image."""
    angle, (left, right) = torch.deg2rad(torch.tensor(degrees)), vectors.chunk(2, dim=1)
    turned = torch.cat([left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()], dim=1)
    return torch.where((torch.arange(len(vectors)) % 2 == 0)[:, None], turned, vectors)


def swapped(vectors: Tensor, a: int, b: int) -> Tensor:
    return vectors[[{a: b, b: a}.get(index, index) for index in range(len(vectors))]]


@pytest.mark.parametrize("gate", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "break_it",
    [
        lambda vectors: vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))],
        lambda vectors: rotated(vectors, 30.0),
        lambda vectors: swapped(vectors, 3, 14),
        lambda vectors: vectors.abs(),
        lambda vectors: torch.cat([vectors[:1]] * len(vectors)) + noise(vectors, 1e-3),
    ],
    ids=["permuted", "half rotated", "one pair swapped", "signs lost", "all alike"],
)
def test_embeddings_of_other_neighbours_fail(break_it: Callable[[Tensor], Tensor], gate: str) -> None:
    result = searched(break_it(embeddings()), embeddings(), gate=gate)
    assert result.retrieval.unexcused > 0
    assert any("rank changes by more than noise explains" in failure for failure in result.failures)


def test_a_pair_that_is_swapped_is_named_first() -> None:
    change = searched(swapped(embeddings(), 3, 14), embeddings()).retrieval.changes[0]
    assert {change.image, change.lost, change.gained} & {"3.png", "14.png"}
    assert (change.excused, change.margin > 0.1) == (False, True)


@pytest.mark.parametrize(("size", "gate"), [(1e-6, "fp32"), (1e-3, "fp16"), (4e-3, "bf16")])
def test_noise_that_changes_ranks_within_its_margin_passes(size: float, gate: str) -> None:
    reference = embeddings(400)
    result = searched(reference + noise(reference, size), reference, gate=gate)
    assert (result.failures, result.retrieval.unexcused) == ((), 0)
    assert result.retrieval.changed > 0 or gate == "fp32"
    assert result.retrieval.excused_margin == pytest.approx(NOISE_MARGIN * result.retrieval.rms_error)


def test_images_that_are_there_twice_do_not_fail() -> None:
    once = embeddings(30)
    reference = once[[index // 3 for index in range(90)]]  # three of each, all neighbours tied
    for candidate in (reference, reference + noise(reference, 1e-6)):
        result = searched(candidate, reference)
        assert (result.passed, result.retrieval.unexcused) == (True, 0)
    assert result.retrieval.changed > 0


def test_a_change_excuses_at_most_what_the_gate_allows() -> None:
    candidate, reference = embeddings() + noise(embeddings(), 0.5), embeddings()
    loose, tight = (searched(candidate, reference, gate=gate).retrieval for gate in ("bf16", "fp32"))
    assert loose.rms_error == tight.rms_error > GATES["bf16"].relative_l2_max
    assert loose.excused_margin == NOISE_MARGIN * GATES["bf16"].relative_l2_max
    assert tight.excused_margin == NOISE_MARGIN * GATES["fp32"].relative_l2_max


@pytest.mark.parametrize(("count", "stride"), [(2, 1), (8, 1), (9, 2), (16, 2), (17, 4), (64, 8), (65, 16)])
def test_beyond_the_limit_evenly_spread_images_are_kept_and_counted(count: int, stride: int) -> None:
    vectors, labels = embeddings(count), [index // 5 % 3 for index in range(count)]
    running, whole = RunningRetrieval(limit=8), RunningRetrieval()
    for at in range(0, count, 3):
        running.add(vectors[at : at + 3], vectors[at : at + 3])
    kept = list(range(0, count, stride))
    whole.add(vectors[kept], vectors[kept])
    found = running.result([str(index) for index in range(count)], labels, 1.0)
    assert (found.images, found.available, found.stride) == (len(kept), count, stride)
    if count > 2:
        few = whole.result([str(index) for index in kept], [labels[index] for index in kept], 1.0)
        assert replace(found, available=len(kept), stride=1) == few


@pytest.mark.parametrize(("count", "values"), [(3, [1]), (6, [1]), (7, [1, 5]), (11, [1, 5]), (12, [1, 5, 10])])
def test_a_k_that_takes_all_other_images_is_not_counted(count: int, values: list[int]) -> None:
    vectors = embeddings(count)
    assert [row.k for row in searched(vectors, vectors).retrieval.neighbours] == values


@pytest.mark.parametrize(
    ("candidate", "words"),
    [(embeddings(2), "2 images, and it takes 3"), (embeddings(9) / torch.zeros(9, 1), "of 9 images are not finite")],
)
def test_what_cannot_be_searched_is_said(candidate: Tensor, words: str) -> None:
    result = searched(candidate, embeddings(len(candidate)))
    assert words in "".join(result.lines())
    assert result.retrieval == Retrieval(len(candidate), len(candidate), not_computed=result.retrieval.not_computed)


def test_embeddings_of_different_shape_are_refused() -> None:
    with pytest.raises(InputError, match="same images"):
        RunningRetrieval().add(embeddings(4), embeddings(5))


def test_images_alone_with_their_label_are_not_counted_by_labels() -> None:
    labels = [0, 0, 1, 2, 2, 3, 4, 4, 5, 5]
    result = searched(embeddings(10), embeddings(10), labels)
    assert result.retrieval.labelled == 8
    assert "2 images are alone with their label" in "".join(result.lines())
    assert searched(embeddings(10), embeddings(10)).retrieval.neighbours[0].reference_labels is None


def test_the_table_and_json_tell_of_ranks_and_labels() -> None:
    labels = [index % 10 for index in range(COUNT)]
    result = searched(swapped(embeddings(), 3, 14), embeddings(), labels)
    text = "\n".join(result.lines(at_most=2))
    for words in ("60 of 60 images", "not excused (margin above 6.00e-02)", "label among k: torch", "NOT EXCUSED"):
        assert words in text
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))["retrieval"]
    assert [row["k"] for row in document["neighbours"]] == [1, 5, 10]
    assert len(document["changes"]) == document["changed"] > document["unexcused"] > 0 or document["unexcused"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 images in two class folders, the second image a copy of the first."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, image in enumerate(image_like_batches(80, 40, batch_size=1)):
        path = folder / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    (folder / "a" / "02.png").write_bytes((folder / "a" / "00.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The smallest network's embedding, as it is and of length one, in FP32 at 32 px. Shared: do not change it."""
    return cnx.export(
        "tiny-test", task="features", outputs=("embedding", "unit-embedding"), precision="fp32", image_size=32,
        batch=(1, 4, 8), output_dir=tmp_path_factory.mktemp("features"),
    )  # fmt: skip


def test_verify_searches_among_all_images_of_a_folder_and_what_it_saves_is_judged_alike(
    features: Artifact, pictures: Path, tmp_path: Path
) -> None:
    (report,) = cnx.verify([features.path], data=pictures, save_outputs=tmp_path / "saved").results
    assert [result.output for result in report.results] == ["embedding", "unit_embedding"]
    for result in report.results:
        assert isinstance(result, RetrievalResult)
        found = result.retrieval
        assert (result.failures, found.images, found.labelled) == ((), 80, 80)
        assert (found.neighbours[2].overlap, found.neighbours[0].recall) == (1.0, 1.0)
        assert found.neighbours[0].reference_labels == found.neighbours[0].candidate_labels
        assert 0.0 < found.neighbours[0].reference_labels < 1.0
    (again,) = judge_saved(tmp_path / "saved")
    assert again.results == report.results
    (limited,) = cnx.verify([features.path], data=pictures, samples=20).results
    assert {result.differences.samples for result in limited.results} == {20}
    (seeded,) = cnx.verify([features.path]).results
    assert [row.reference_labels for row in seeded.results[0].retrieval.neighbours] == [None] * 3


class Swapping(HoldsNothing):
    """A runner that gives two of the images of a run each other's embedding."""

    def __init__(self, runner: Runner, first: int) -> None:
        self.info, self.input_spec, self.device, self.runner = runner.info, runner.input_spec, runner.device, runner
        self.first, self.done = first, 0

    def run(self, images: torch.Tensor) -> Outputs:
        outputs, at = self.runner.run(images), self.first - self.done
        self.done += len(images)
        if 0 <= at < len(images) - 1:
            order = [{at: at + 1, at + 1: at}.get(index, index) for index in range(len(images))]
            outputs = {name: output[order] for name, output in outputs.items()}
        return outputs


def test_verify_fails_where_two_images_have_each_others_embedding(features: Artifact, pictures: Path) -> None:
    reference = Reference(features, pictures)
    with OrtRunner(features.path) as runner:
        wrong = Candidate(features, Swapping(runner, 40), runner.input_spec, GATES["bf16"])
        results = reference.judge(wrong)
    for result in results:
        assert isinstance(result, RetrievalResult)
        assert result.retrieval.unexcused > 0
        assert any("rank changes" in failure for failure in result.failures)
