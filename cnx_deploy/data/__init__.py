"""What a model is given: sources of images, datasets of labelled files, decoding and preprocessing."""

from cnx_deploy.data.bands import picture_of, pixels_of
from cnx_deploy.data.checks import ClassBalance, ImageCheck, check_images, class_balance, without_broken
from cnx_deploy.data.coco import InstanceFiles, find_instance_dataset, find_instance_images, instance_lines
from cnx_deploy.data.dataset import Dataset, few_labels, find_dataset, find_images, image_source, images_to_run
from cnx_deploy.data.image_files import SUFFIXES
from cnx_deploy.data.image_source import (
    GivenImages,
    ImageBatch,
    ImageBatches,
    ImageFiles,
    ImageLike,
    ImageSource,
    evenly,
    image_like_batches,
)  # fmt: skip
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.data.multi_label import label_lines
from cnx_deploy.data.pixels import MAX_PIXELS, load_image, upright
from cnx_deploy.data.preprocessing import normalise, placement, runner_input, to_pixels
from cnx_deploy.data.segmentation import (
    MaskReading,
    SegmentationFiles,
    find_segmentation_dataset,
    find_segmentation_images,
    pixel_lines,
)

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "ClassBalance",
    "Dataset",
    "GivenImages",
    "ImageBatch",
    "ImageBatches",
    "ImageCheck",
    "ImageFiles",
    "ImageLike",
    "ImageSource",
    "InputSpec",
    "InstanceFiles",
    "MaskReading",
    "SegmentationFiles",
    "check_images",
    "class_balance",
    "evenly",
    "few_labels",
    "find_dataset",
    "find_images",
    "find_instance_dataset",
    "find_instance_images",
    "find_segmentation_dataset",
    "find_segmentation_images",
    "image_like_batches",
    "image_source",
    "images_to_run",
    "instance_lines",
    "label_lines",
    "load_image",
    "normalise",
    "picture_of",
    "pixel_lines",
    "pixels_of",
    "placement",
    "runner_input",
    "to_pixels",
    "upright", "without_broken",
]  # fmt: skip
