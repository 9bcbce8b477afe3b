"""FCMAE: pre-training an encoder by predicting hidden patches of images without labels."""

from cnx_deploy.training.fcmae.autoencoder import (
    MaskedAutoencoder,
    create_autoencoder,
    load_autoencoder,
    masked_features,
)
from cnx_deploy.training.fcmae.run import divide_images, find_images_below, pretrain, readable_images
from cnx_deploy.training.fcmae.spec import PretrainingRecord, PretrainingResult, PretrainingSpec

__all__ = [
    "MaskedAutoencoder",
    "PretrainingRecord",
    "PretrainingResult",
    "PretrainingSpec",
    "create_autoencoder",
    "divide_images",
    "find_images_below",
    "load_autoencoder",
    "masked_features",
    "pretrain",
    "readable_images",
]
