"""FCMAE: pre-training an encoder by predicting hidden patches of images without labels."""

from cnx_deploy.training.fcmae.autoencoder import MaskedAutoencoder, create_autoencoder, load_autoencoder
from cnx_deploy.training.fcmae.encoder import masked_features
from cnx_deploy.training.fcmae.images import UnlabelledImages, divide_images, find_images_below, readable_images
from cnx_deploy.training.fcmae.records import (
    PretrainingProgress,
    PretrainingRecord,
    PretrainingResult,
    SilentPretraining,
)
from cnx_deploy.training.fcmae.run import pretrain
from cnx_deploy.training.fcmae.spec import PretrainingSpec

__all__ = [
    "MaskedAutoencoder",
    "PretrainingProgress",
    "PretrainingRecord",
    "PretrainingResult",
    "PretrainingSpec",
    "SilentPretraining",
    "UnlabelledImages",
    "create_autoencoder",
    "divide_images",
    "find_images_below",
    "load_autoencoder",
    "masked_features",
    "pretrain",
    "readable_images",
]
