"""What a model is given: files, folders and CSV files of labelled images, pixels, and batches made from a seed."""

from cnx_deploy.data.balance import ClassBalance, class_balance
from cnx_deploy.data.batches import batches_from_folder, readable_batches
from cnx_deploy.data.broken import BrokenImage, ImageCheck, check_images, without_broken
from cnx_deploy.data.dataset import Dataset, Split, few_labels
from cnx_deploy.data.decoding import MAX_PIXELS, SUFFIXES, load_image, upright_rgb
from cnx_deploy.data.finding import find_dataset, find_images
from cnx_deploy.data.folders import validation_folder
from cnx_deploy.data.preprocessing import runner_input
from cnx_deploy.data.synthetic import image_like_batches

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "BrokenImage",
    "ClassBalance",
    "Dataset",
    "ImageCheck",
    "Split",
    "batches_from_folder",
    "check_images",
    "class_balance",
    "few_labels",
    "find_dataset",
    "find_images",
    "image_like_batches",
    "load_image",
    "normalise",
    "readable_batches",
    "runner_input",
    "to_pixels",
    "upright_rgb",
    "validation_folder",
    "without_broken",
]
