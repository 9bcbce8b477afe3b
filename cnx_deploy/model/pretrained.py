"""The published weights: their names, and how their files come from the model hub or its cache.

timm's conversions are used because they exist as safetensors for all 26; the weights are Meta's, CC-BY-NC 4.0.
Source of the names: timm 1.0.31, `timm.models.convnext.default_cfgs`; a test compares.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from cnx_deploy.core.errors import CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.files import sha256_of_file
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.model.source_config import json_object, timm_config

__all__ = ["PRETRAINED_LICENCE", "PRETRAINED_TAGS", "PretrainedFiles", "fetch_pretrained", "variant_name_of_tag"]

PRETRAINED_LICENCE = "CC-BY-NC-4.0"

PRETRAINED_TAGS = (
    "convnextv2_atto.fcmae",
    "convnextv2_atto.fcmae_ft_in1k",
    "convnextv2_femto.fcmae",
    "convnextv2_femto.fcmae_ft_in1k",
    "convnextv2_pico.fcmae",
    "convnextv2_pico.fcmae_ft_in1k",
    "convnextv2_nano.fcmae",
    "convnextv2_nano.fcmae_ft_in1k",
    "convnextv2_nano.fcmae_ft_in22k_in1k",
    "convnextv2_nano.fcmae_ft_in22k_in1k_384",
    "convnextv2_tiny.fcmae",
    "convnextv2_tiny.fcmae_ft_in1k",
    "convnextv2_tiny.fcmae_ft_in22k_in1k",
    "convnextv2_tiny.fcmae_ft_in22k_in1k_384",
    "convnextv2_base.fcmae",
    "convnextv2_base.fcmae_ft_in1k",
    "convnextv2_base.fcmae_ft_in22k_in1k",
    "convnextv2_base.fcmae_ft_in22k_in1k_384",
    "convnextv2_large.fcmae",
    "convnextv2_large.fcmae_ft_in1k",
    "convnextv2_large.fcmae_ft_in22k_in1k",
    "convnextv2_large.fcmae_ft_in22k_in1k_384",
    "convnextv2_huge.fcmae",
    "convnextv2_huge.fcmae_ft_in1k",
    "convnextv2_huge.fcmae_ft_in22k_in1k_384",
    "convnextv2_huge.fcmae_ft_in22k_in1k_512",
)


@dataclass(frozen=True, slots=True)
class PretrainedFiles:
    """Weights on this disk, beside their `config.json`. `num_classes` None: pre-trained without a head."""

    weights: Path
    num_classes: int | None


def variant_name_of_tag(tag: str) -> str:
    """`convnextv2_atto.fcmae_ft_in1k` -> `atto`. InputError names close tags when there is no such tag."""
    if tag not in PRETRAINED_TAGS:
        close = difflib.get_close_matches(tag, PRETRAINED_TAGS, n=5, cutoff=0.5) or PRETRAINED_TAGS
        raise InputError(f"No pretrained weights are called {tag!r}. Choose one of: {', '.join(close)}.")
    return tag.removeprefix("convnextv2_").partition(".")[0]


def fetch_pretrained(tag: str, cache_dir: Path | None = None) -> PretrainedFiles:
    """Return the files of a tag from the hub's cache, else from the network.

    `cache_dir` None means huggingface_hub's own. Raises InputError for an unknown tag, MissingRequirementError when
    the files are neither cached nor reachable, CorruptArtifactError when a cached file was altered.
    """
    variant_name_of_tag(tag)
    config_path, weights = (_fetch(tag, name, cache_dir) for name in ("config.json", "model.safetensors"))
    _check_blob(weights)
    config = json_object(config_path) or {}
    classes = config.get("num_classes")
    try:
        Preprocessing(**timm_config(config, str(config_path)).preprocessing)
        if type(classes) is not int or classes < 0:
            raise InputError(f"num_classes is {classes!r}, expected a number")
    except InputError as error:
        raise CorruptArtifactError(
            f"{config_path} is not a timm model's config ({error}). Delete it and fetch again."
        ) from error
    return PretrainedFiles(weights, classes or None)


def _fetch(tag: str, file_name: str, cache_dir: Path | None) -> Path:
    from huggingface_hub import hf_hub_download  # a second of import that no other command needs
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository = f"timm/{tag}"
    try:
        return Path(hf_hub_download(repository, file_name, cache_dir=cache_dir, local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not cached: ask the network
    try:
        return Path(hf_hub_download(repository, file_name, cache_dir=cache_dir))
    except (EntryNotFoundError, OSError) as error:  # connection and HTTP errors are OSErrors
        raise MissingRequirementError(
            f"{file_name} of {tag} is not in the model hub's cache and could not be fetched ({type(error).__name__}). "
            f"On a machine with network run `hf download {repository} config.json model.safetensors`, then copy its "
            "cache here and point HF_HOME at it."
        ) from error


def _check_blob(path: Path) -> None:
    """The cache names a large file by its SHA-256; a link leads there. Where files are copied there is no name."""
    name = path.resolve().name
    if len(name) == 64 and (found := sha256_of_file(path)) != name:
        raise CorruptArtifactError(
            f"{path} was altered: SHA-256 {found[:12]}…, the cache names it {name[:12]}…. Delete it and fetch it again."
        )
