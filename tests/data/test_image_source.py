"""Sources of images: batches as any runner takes them, broken files, even choices, checked sizes, seeded images."""

import pytest
import torch
from PIL import Image

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import GivenImages, ImageFiles, ImageLike, ImageSource, evenly, find_images, runner_input
from cnx_deploy.data.image_source import checked_sizes
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.data.preprocessing import to_pixels

PREPROCESSING = Preprocessing(32)
UINT8 = InputSpec("uint8", 32)


@pytest.fixture
def files(tmp_path) -> ImageFiles:
    """Ten images of class a and ten of class b."""
    for index in range(20):
        path = tmp_path / "ab"[index % 2] / f"{index // 2:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    return find_images(tmp_path)


def made(source, *words, **options):
    return list(source.batches(PREPROCESSING, *words, **options))


@pytest.mark.parametrize("size", [1, 4, 7, 64])
def test_batches_leave_out_broken_files_name_them_and_are_full_but_for_the_last(files, size):
    bad = [files.paths[index] for index in (0, 1, 2, 9, 19)]
    for path in bad:
        path.write_bytes(path.read_bytes()[:40])
    batches = files.batches(PREPROCESSING, UINT8, size, leave_out_broken=True)
    read = list(batches)
    assert [len(batch) for batch in read] == [size] * (15 // size) + [15 % size] * (15 % size > 0)
    assert {index: image.path for index, image in batches.broken.items()} == {
        index: str(files.paths[index]) for index in (0, 1, 2, 9, 19)
    }
    assert all(image.path in image.reason for image in batches.broken.values())
    good = [index for index in range(20) if index not in batches.broken]
    assert [index for batch in read for index in batch.indices] == good
    assert [name for batch in read for name in batch.names] == [str(files.paths[index]) for index in good]
    assert torch.cat([batch.labels for batch in read]).tolist() == [0] * 6 + [1] * 9
    assert torch.equal(read[-1].images[len(read[-1]) - 1], files.pixels(good[-1], PREPROCESSING))


def test_a_broken_file_ends_batches_that_may_leave_none_out(files):
    files.paths[3].write_text("no image")
    with pytest.raises(InputError, match=str(files.paths[3])):
        made(files, UINT8)


def test_a_batch_below_the_runners_smallest_is_filled_up_with_copies_that_have_no_name():
    source, spec = ImageLike(10), InputSpec("float", 32, 4, 4)
    first, second, third = made(source, spec, 64)
    assert [tuple(batch.images.shape) for batch in (first, second, third)] == [(4, 3, 32, 32)] * 3
    assert (len(third), third.indices, len(third.names), len(third.labels)) == (2, (8, 9), 2, 2)
    assert torch.equal(third.images[2:], third.images[:1].expand(2, -1, -1, -1))
    assert torch.equal(
        first.images, runner_input(torch.stack([source.pixels(at, PREPROCESSING) for at in range(4)]), "float")
    )


def test_images_of_another_size_than_the_runners_are_refused():
    with pytest.raises(InputError, match="64 pixels and the preprocessing makes 32"):
        made(ImageLike(1), InputSpec("float", 64))


@pytest.mark.parametrize(
    ("count", "limit", "chosen"),
    [(18, 3, [0, 6, 12]), (4, 9, [0, 1, 2, 3]), (5, None, [0, 1, 2, 3, 4]), (5, 4, [0, 1, 2, 3])],
)
def test_a_choice_is_spread_evenly_so_that_sorted_classes_are_all_met(count, limit, chosen):
    assert evenly(count, limit) == chosen


@pytest.mark.parametrize(
    ("smallest", "largest", "sizes"),
    [(1, 64, [1, 2, 7, 64]), (1, None, [1, 2, 7, 64]), (2, 5, [2, 5]), (8, 8, [8]), (1, 1, [1])],
)
def test_kernels_are_checked_at_one_two_seven_and_the_largest_batch(smallest, largest, sizes):
    spec = InputSpec("uint8", 32, smallest, largest)
    assert checked_sizes(spec) == sizes


def test_sizes_are_taken_in_turn_and_the_last_goes_on():
    assert [len(batch) for batch in made(ImageLike(20), UINT8, [1, 2, 7])] == [1, 2, 7, 7, 3]


class Arrays(ImageSource):
    """Images in memory, as a caller may bring them."""

    class_names = ("dark", "bright")

    def __init__(self, levels):
        self.levels = levels

    def __len__(self):
        return len(self.levels)

    def pixels(self, index, preprocessing):
        return to_pixels(Image.new("L", (48, 48), self.levels[index]), preprocessing)

    def label(self, index):
        return int(self.levels[index] > 127)


def test_a_source_from_outside_has_all_that_the_others_have():
    (batch,) = made(Arrays([10, 200, 90]), InputSpec("float", 32, 1, 8), indices=[1, 2])
    assert batch.names == ("image 1", "image 2")
    assert batch.labels.tolist() == [1, 0]
    assert batch.images.amax(dim=(1, 2, 3)).tolist() == pytest.approx([200 / 255, 90 / 255])


def test_given_images_may_be_labelled_and_what_is_no_image_is_named_by_its_place(files):
    picture = Image.new("RGB", (8, 8), (12, 0, 0))  # as the seventh of class a
    source = GivenImages([files.paths[6], picture, 42], labels=(1, 0, 1), class_names=("dark", "bright"))
    batches = source.batches(PREPROCESSING, UINT8, leave_out_broken=True)
    (batch,) = batches
    assert (batch.names, batch.labels.tolist()) == ((str(files.paths[6]), "image 1"), [1, 0])
    assert torch.equal(batch.images[0], batch.images[1])
    assert [(image.path, "got int" in image.reason) for image in batches.broken.values()] == [("image 2", True)]


def test_image_like_images_follow_the_seed_and_not_the_number_of_them():
    few, many, others = ImageLike(5, 7), ImageLike(50, 7), ImageLike(5, 8)
    for index in range(5):
        assert torch.equal(few.pixels(index, PREPROCESSING), many.pixels(index, PREPROCESSING))
        assert not torch.equal(few.pixels(index, PREPROCESSING), others.pixels(index, PREPROCESSING))


def image_like(count, side):
    (batch,) = ImageLike(count).batches(Preprocessing(side), InputSpec("uint8", side))
    return batch.images


def test_every_image_like_image_uses_the_full_range_with_its_own_contrast():
    images = image_like(16, 64)
    assert images.dtype == torch.uint8
    assert images.shape == (16, 64, 64, 3)
    assert torch.equal(images.amin(dim=(1, 2, 3)), torch.zeros(16, dtype=torch.uint8))
    assert torch.equal(images.amax(dim=(1, 2, 3)), torch.full((16,), 255, dtype=torch.uint8))
    contrast = images.float().std(dim=(1, 2, 3))
    assert contrast.max() > 1.5 * contrast.min()


def test_the_power_of_image_like_images_falls_with_frequency_in_fine_detail_too():
    power = torch.fft.rfft2(image_like(8, 64).float(), dim=(1, 2)).abs().square()
    coarse, middle, fine = (power[:, low:high, low:high].median() for low, high in ((1, 4), (10, 16), (24, 32)))
    # White noise under the same shapes has 147 and 1.4.
    assert coarse > 400 * fine
    assert middle > 3 * fine


def test_runner_input_has_the_layout_of_its_kind():
    pixels = image_like(2, 32)
    floats = runner_input(pixels, "float")
    assert torch.equal(runner_input(pixels, "uint8"), pixels)
    assert floats.shape == (2, 3, 32, 32)
    assert floats.is_contiguous()
    assert torch.equal((floats * 255).round().to(torch.uint8).permute(0, 2, 3, 1), pixels)
    with pytest.raises(InputError, match="half"):
        runner_input(pixels, "half")
