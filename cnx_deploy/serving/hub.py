"""A folder that timm and transformers load as theirs: weights, labels, preprocessing and a model card.

One `config.json` serves both, for each reads its own fields. Weights cannot be shared, for the two name the same
tensors differently and both refuse a stranger: `model.safetensors` has timm's names, `model.transformers.safetensors`
those of transformers, and `config.json` says so (`transformers_weights`). Both files carry the project's own header, so
that `model.checkpoint` reads classes, preprocessing, thresholds and licence back as they were.

Sources: timm `timm.models._hub`; transformers `modeling_utils` and `image_processing_convnext`; the model card's fields
https://huggingface.co/docs/hub/model-cards.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from cnx_deploy.core.errors import CnxDeployError, InputError, MissingRequirementError
from cnx_deploy.core.files import whole_folder
from cnx_deploy.core.image_size import sides, size_text
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import V1_VARIANTS, VARIANTS, Variant
from cnx_deploy.model.checkpoint import LoadedModel, hash_weights, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.layers import EPS
from cnx_deploy.model.source_config import CONFIG, PROCESSOR, RESAMPLING
from cnx_deploy.model.weight_files import METADATA_KEY

__all__ = ["CARD", "LIBRARIES", "HubFolder", "Library", "check_repo_id", "upload_folder", "write_hub_folder"]

Library = Literal["timm", "transformers"]
LIBRARIES: tuple[Library, ...] = ("timm", "transformers")
CARD = "README.md"
WEIGHTS, TRANSFORMERS_WEIGHTS = "model.safetensors", "model.transformers.safetensors"
OURS = (WEIGHTS, TRANSFORMERS_WEIGHTS, PROCESSOR, CARD, CONFIG)
"""Every file that a folder may have."""
TASKS = ("classification", "multi-label", "features")
"""Tasks whose network both libraries have: a pooled last stage, a norm and a linear layer or none."""
SQUASH_FROM = 384
"""Side in pixels from which transformers' ConvNeXt processor squashes a picture and crops nothing."""
LICENCES = (
    "apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0", "cc0-1.0", "mit",
    "unknown",
)  # fmt: skip
"""Licences that a model card may name as they are; any other is `other` with a name."""


@dataclass(frozen=True, slots=True)
class HubFolder:
    """A folder that was written. `notes`: what a library cannot say of the network. `url`: where it was uploaded."""

    path: Path
    files: tuple[str, ...]
    libraries: tuple[Library, ...]
    notes: tuple[str, ...] = ()
    url: str | None = None

    def __str__(self) -> str:
        shown = f"{self.path}: {', '.join(self.files)}"
        return shown if self.url is None else f"{shown}\n{self.url}"


def write_hub_folder(
    loaded: LoadedModel,
    preprocessing: Preprocessing,
    folder: Path,
    *,
    artifacts: Sequence[Artifact] = (),
    library: Library | None = None,
    force: bool = False,
) -> HubFolder:
    """Write a network as a folder for timm and transformers; nothing is fetched or sent.

    Args:
        loaded: the network; its class names and licence go along.
        preprocessing: how its images are made.
        folder: where to; it is written whole or not at all.
        artifacts: recorded files of these weights, whose results the model card lists.
        library: the one library that the folder is for; None is both.
        force: replace a hub folder that is there, one with nothing else in it.

    Raises:
        InputError: a network that the libraries do not have, or an artifact of other weights.
        OutputExistsError: something is in the folder.
    """
    if library is not None and library not in LIBRARIES:
        raise InputError(f"No library is called {library!r}. Choose one of: {', '.join(LIBRARIES)}; None is both.")
    model, libraries = loaded.model, LIBRARIES if library is None else (library,)
    _check_network(model)
    own = hash_weights(model)
    for artifact in artifacts:
        if (other := artifact.manifest.model.weights.sha256) != own:
            raise InputError(
                f"{artifact.path} was made from other weights (hash {other[:12]}…) than those of this folder "
                f"({own[:12]}…), so that its figures say nothing of them. Leave it out, or push from it alone."
            )
    processor, notes = None, list[str]()
    if "transformers" in libraries:
        processor, told = _processor(preprocessing)
        notes += told
    if "timm" in libraries:
        notes += _unsaid_by_timm(preprocessing)
    notes += _unsaid(loaded, preprocessing, artifacts)
    config = _config(loaded, preprocessing, libraries)
    if processor is not None:
        # transformers reads the class from here where a folder has timm's fields too, see `is_timm_local_checkpoint`.
        config["image_processor_type"] = processor["image_processor_type"]
    weights: dict[str, Library] = {WEIGHTS: libraries[0]}
    if len(libraries) == 2:
        weights[TRANSFORMERS_WEIGHTS] = "transformers"
    words = (loaded, preprocessing, folder.resolve().name, libraries, artifacts, notes, own)
    texts = {CONFIG: _json(config), CARD: _card(*words, has_processor=processor is not None)}
    if processor is not None:
        texts[PROCESSOR] = _json(processor)

    size = len(weights) * sum(4 * tensor.numel() for tensor in model.state_dict().values())
    with whole_folder(folder, force=force, is_own=_is_hub_folder, needed_bytes=size) as temporary:
        for name, names_of in weights.items():
            save_checkpoint(
                temporary / name, model, class_names=loaded.class_names, preprocessing=preprocessing,
                licence=loaded.weights.licence, library=names_of,
                extra={"training": loaded.training} if loaded.training else None,
            )  # fmt: skip
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8", newline="\n")
            (temporary / name).chmod(0o644)
    written = tuple(name for name in OURS if name in weights or name in texts)
    return HubFolder(folder, written, libraries, tuple(notes))


def check_repo_id(repo_id: str) -> None:
    """Raise InputError for what is no repository's name on a model hub, such as `user/model`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(
            f"{repo_id!r} is no name of a repository: expected user/model or organisation/model ({error})."
        ) from error


def upload_folder(made: HubFolder, repo_id: str, *, public: bool = False) -> str:
    """Upload the files of a folder to a model hub in one commit, and return the repository's address.

    A new repository is private unless `public`; one that exists stays as it is. The token and the address of the hub
    come from where huggingface_hub looks for them (`HF_TOKEN`, `hf auth login`, `HF_ENDPOINT`).

    Raises:
        MissingRequirementError: no token, or no right to write there.
        CnxDeployError: the hub cannot be reached or refuses; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # requests, httpx or httpx2, by the version of huggingface_hub: what they raise without an answer is its base.
    transport: type[BaseException] = HfHubHTTPError.__bases__[0]
    hub = HfApi()
    try:
        address = hub.create_repo(repo_id, private=not public, exist_ok=True)
        hub.upload_folder(
            repo_id=repo_id, folder_path=made.path, allow_patterns=list(made.files),
            commit_message=f"Upload {made.path.name} with cnx-deploy",
        )  # fmt: skip
    # Of a file of weights that does not get through huggingface_hub makes a RuntimeError.
    except (OSError, RuntimeError, transport) as error:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
            raise MissingRequirementError(
                f"The hub does not let this user write to {repo_id} ({reason}). Set HF_TOKEN to a token with the right "
                f"to write, or run `hf auth login`. {made.path} is written; the same command with --force uploads it."
            ) from error
        raise CnxDeployError(
            f"{made.path} is written, but was not uploaded to {repo_id} ({reason}). Check the network and HF_ENDPOINT, "
            "then run the same command with --force."
        ) from error
    return str(address)


def _check_network(model: ConvNeXtV2) -> None:
    """Raise InputError for a network that timm and transformers do not have."""
    if model.task.name not in TASKS:
        raise InputError(
            f"The task {model.task.name} has heads that timm's and transformers' ConvNeXt do not have: expected one of "
            f"{', '.join(TASKS)}. Give users the checkpoint as it is."
        )


def _is_hub_folder(folder: Path) -> bool:
    """Whether a folder holds what `push` writes and nothing else. The libraries' own folders have the same names."""
    names = {path.name for path in folder.iterdir()}
    if not {WEIGHTS, CARD, CONFIG} <= names <= {*OURS}:
        return False
    try:
        with safe_open(folder / WEIGHTS, "pt") as weights:
            return METADATA_KEY in (weights.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _config(loaded: LoadedModel, preprocessing: Preprocessing, libraries: Sequence[Library]) -> dict[str, Any]:
    """The fields of `config.json` that the libraries read. Neither minds those of the other."""
    config: dict[str, Any] = {}
    if "timm" in libraries:
        config |= _timm_config(loaded, preprocessing)
    if "transformers" in libraries:
        config |= _transformers_config(loaded, preprocessing)
    if len(libraries) == 2:
        config["transformers_weights"] = TRANSFORMERS_WEIGHTS
    return config


def _timm_config(loaded: LoadedModel, preprocessing: Preprocessing) -> dict[str, Any]:
    model, (height, width) = loaded.model, sides(preprocessing.image_size)
    architecture, arguments = _timm_architecture(model.variant)
    pretrained: dict[str, Any] = {
        "custom_load": False, "input_size": [model.in_chans, height, width], "fixed_input_size": False,
        "interpolation": preprocessing.interpolation, "crop_pct": preprocessing.crop_ratio,
        "crop_mode": preprocessing.crop_mode.removesuffix("-floor"), "mean": list(preprocessing.mean),
        "std": list(preprocessing.std), "num_classes": model.num_classes, "pool_size": [height // 32, width // 32],
        "first_conv": "stem.0", "classifier": "head.fc", "license": loaded.weights.licence,
    }  # fmt: skip
    config: dict[str, Any] = {"architecture": architecture, "num_classes": model.num_classes}
    config |= {"num_features": model.variant.dims[-1], "global_pool": "avg", "model_args": arguments}
    if loaded.class_names is not None:
        config["label_names"] = list(loaded.class_names)
    return {**config, "pretrained_cfg": pretrained}


def _timm_architecture(variant: Variant) -> tuple[str, dict[str, Any]]:
    """Timm's name of a size, and the arguments in which a network of ours differs from what the name stands for."""
    # timm builds atto to nano with 1x1 convolutions in the place of linear layers: other shapes, and other rounding.
    linear = {"conv_mlp": False}
    if VARIANTS.get(variant.name) == variant:
        return f"convnextv2_{variant.name}", linear
    if V1_VARIANTS.get(variant.name) == variant:
        return f"convnext_{variant.name.removeprefix('v1-')}", linear
    sizes = {"depths": list(variant.depths), "dims": list(variant.dims)}
    return ("convnext_tiny" if variant.version == 1 else "convnextv2_tiny"), {**sizes, **linear}


def _transformers_config(loaded: LoadedModel, preprocessing: Preprocessing) -> dict[str, Any]:
    model, size = loaded.model, preprocessing.image_size
    variant, family = model.variant, "ConvNextV2" if model.variant.version == 2 else "ConvNext"
    config: dict[str, Any] = {
        "architectures": [f"{family}{'ForImageClassification' if model.num_classes else 'Model'}"],
        "model_type": family.lower(), "depths": list(variant.depths), "hidden_sizes": list(variant.dims),
        "num_stages": 4, "patch_size": 4, "num_channels": model.in_chans, "hidden_act": "gelu", "layer_norm_eps": EPS,
        "image_size": size if isinstance(size, int) else list(size), "drop_path_rate": 0.0, "torch_dtype": "float32",
    }  # fmt: skip
    if variant.version == 1:
        config["layer_scale_init_value"] = 1e-6
    if model.num_classes:
        names = loaded.class_names or tuple(f"LABEL_{index}" for index in range(model.num_classes))
        config["id2label"] = {str(index): name for index, name in enumerate(names)}
        config["label2id"] = {name: index for index, name in enumerate(names)}
        single = "single_label_classification"
        config["problem_type"] = "multi_label_classification" if model.task.takes_label_sets else single
    return config


def _processor(preprocessing: Preprocessing) -> tuple[dict[str, Any] | None, list[str]]:
    """`preprocessor_config.json`, and how its pictures differ; None, with the reason, where no processor makes them."""
    mode, ratio, size = preprocessing.crop_mode, preprocessing.crop_ratio, preprocessing.image_size
    reason = None
    if preprocessing.in_chans != 3:
        reason = f"images of {preprocessing.in_chans} channel{'s' if preprocessing.in_chans > 1 else ''}"
    elif mode in ("border", "corner"):
        reason = f"the crop mode {mode}"
    elif not isinstance(size, int) and (mode != "squash" or ratio < 1.0):
        reason = f"a crop to {size_text(size)}"
    if reason is not None:
        return None, [f"transformers has no image processor for {reason}, so {PROCESSOR} is left out: make images as "
                      "the model card says."]  # fmt: skip
    height, width = sides(size)
    resized = math.floor(height / ratio)
    fields: dict[str, Any]
    if mode == "squash" and ratio == 1.0:
        kind, fields = "ViT", {"size": {"height": height, "width": width}}
    elif mode == "squash":
        kind, fields = "Bit", {"size": {"height": resized, "width": resized}}
    elif height < SQUASH_FROM:
        kind, fields = "ConvNext", {"size": {"shortest_edge": height}, "crop_pct": ratio}
    else:
        kind, fields = "Bit", {"size": {"shortest_edge": resized}}
    if kind == "Bit":
        fields |= {"do_center_crop": True, "crop_size": {"height": height, "width": width}, "do_convert_rgb": True}
    steps = {
        "image_processor_type": f"{kind}ImageProcessor", "do_resize": True, **fields,
        "resample": RESAMPLING.index(preprocessing.interpolation), "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(preprocessing.mean), "image_std": list(preprocessing.std),
    }  # fmt: skip
    told = ["transformers' processor rounds an odd margin down where timm rounds half a pixel to the even side: such a "
            "picture is cropped one pixel further left or up."]  # fmt: skip
    spare = resized - height  # of a squashed picture the same on both sides
    is_shifted = mode == "center" or (mode == "squash" and round(spare / 2) != spare // 2)
    return steps, told if is_shifted else []


def _unsaid_by_timm(preprocessing: Preprocessing) -> list[str]:
    """What timm's configuration cannot say of images. Raises InputError where it would make other pictures."""
    if preprocessing.crop_mode == "corner":
        raise InputError(
            "timm has no crop mode corner, and would crop the centre. Write the folder for transformers alone with "
            "--library transformers (library); its images are made as the model card says."
        )
    notes = []
    if preprocessing.crop_mode == "center-floor":
        notes.append("timm rounds half a pixel of an odd margin to the even side, where these weights' images round it "
                     "down: such a picture is cropped one pixel further right or down.")  # fmt: skip
    mean = tuple(round(255 * value) for value in preprocessing.mean)
    if preprocessing.crop_mode == "border" and preprocessing.fill != mean:
        notes.append(f"timm fills borders with the mean colour {mean}, not with {preprocessing.fill}.")
    return notes


def _unsaid(loaded: LoadedModel, preprocessing: Preprocessing, artifacts: Sequence[Artifact]) -> list[str]:
    """What neither library's files can say."""
    notes, task = list[str](), loaded.model.task
    if preprocessing.white_level is not None:
        notes.append(f"The white level {preprocessing.white_level:g} of images with more than 8 bits is cnx-deploy's "
                     "alone: bring them to 8 bits by it.")  # fmt: skip
    if task.takes_label_sets:
        cuts = task.thresholds
        limits = f"{min(cuts):.4g} to {max(cuts):.4g}, kept in the header of {WEIGHTS}" if cuts else "one half for all"
        notes.append(
            f"timm gives logits: probabilities are their logistic function. Thresholds of the labels: {limits}."
        )
    answers = {name: value for artifact in artifacts for name, value in artifact.manifest.deploy.answer.items()}
    if answers:
        shown = ", ".join(f"{name} {value}" for name, value in sorted(answers.items()))
        notes.append(f"The folder holds the network itself: {shown} of the exported files is not in it.")
    if loaded.weights.origin == "random":
        notes.append(f"The weights are random (seed {loaded.weights.reference}): results mean nothing.")
    elif loaded.head_is_new:
        notes.append("The head was drawn at random and has to be trained: classes mean nothing.")
    if (assumed := preprocessing.assumption(loaded.origins)) is not None:
        notes.append(assumed.partition(" To say otherwise")[0])
    return notes


def _card(
    loaded: LoadedModel, preprocessing: Preprocessing, name: str, libraries: Sequence[Library],
    artifacts: Sequence[Artifact], notes: Sequence[str], sha256: str, *, has_processor: bool,
) -> str:  # fmt: skip
    """The model card: its fields for the hub, how the folder is loaded, images, licence and recorded figures."""
    model, variant = loaded.model, loaded.model.variant
    family = f"ConvNeXt{' V2' if variant.version == 2 else ''}"
    kind = "image-classification" if model.num_classes else "image-feature-extraction"
    fields: dict[str, Any] = {**_licence_fields(loaded.weights.licence), "library_name": libraries[0]}
    fields |= {"pipeline_tag": kind, "tags": [kind, *libraries, f"convnext{'v2' if variant.version == 2 else ''}"]}
    if loaded.weights.origin == "pretrained":
        fields["base_model"] = f"timm/{loaded.weights.reference}"
    head = f"{model.num_classes} {'labels' if model.task.takes_label_sets else 'classes'}" if model.num_classes else ""
    count = sum(parameter.numel() for parameter in model.parameters())
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()), "---", ""]
    lines += [f"# {name or variant.name}", "", f"{family} {variant.name.removeprefix('v1-')}, {head or 'no head'}, "
              f"{count:,} parameters in float32."]  # fmt: skip
    usage = _usage(model, libraries, name, has_processor=has_processor)
    lines += ["", "## Use", "", "```python", *usage, "```", ""]
    lines += ["## Images", "", "| field | value |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in asdict(preprocessing).items() if value is not None]
    lines += ["", "`mean` and `std` are of an image in [0, 1]. `crop_ratio` is timm's `crop_pct`; cnx-deploy's "
              "documentation says what each crop mode does.", ""]  # fmt: skip
    if notes:
        lines += ["## Limits", "", *(f"- {note}" for note in notes), ""]
    lines += ["## Licence", "", f"{loaded.weights.licence}.", ""]
    if rows := _figures(artifacts):
        lines += ["## Recorded files", "", "Each was compared with these weights in PyTorch. The figures are those of "
                  "its manifest.", "", *rows, ""]  # fmt: skip
    lines += ["Weights: SHA-256 over the tensors", f"`{sha256}`."]
    return "\n".join(lines) + "\n"


def _usage(model: ConvNeXtV2, libraries: Sequence[Library], name: str, *, has_processor: bool) -> list[str]:
    lines = []
    if "timm" in libraries:
        lines += ["import timm", "", f'model = timm.create_model("local-dir:{name}", pretrained=True).eval()']
        lines += ["images = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"]
    if "transformers" in libraries:
        auto = "AutoModelForImageClassification" if model.num_classes else "AutoModel"
        classes = ("AutoImageProcessor", auto) if has_processor else (auto,)
        lines += [""] if lines else []
        lines += [f"from transformers import {', '.join(classes)}", ""]
        lines += [f'model = {auto}.from_pretrained("{name}").eval()']
        lines += [f'images = AutoImageProcessor.from_pretrained("{name}")'] if has_processor else []
    return lines


def _licence_fields(licence: str) -> dict[str, str]:
    """A licence as a model card names it: one of the hub's words, or `other` with the text."""
    word = licence.partition(" ")[0].lower()
    if word in LICENCES and (licence.lower() == word or " (" in licence):
        return {"license": word}
    return {"license": "other", "license_name": licence}


def _figures(artifacts: Sequence[Artifact]) -> list[str]:
    """A table of what the manifests say of their files; nothing is computed."""
    if not artifacts:
        return []
    rows = ["| file | size | precision | output | relative L2, largest | top-1 agreement | images | gate |"]
    rows += ["| --- | --- | --- | --- | --: | --: | --: | --- |"]
    for artifact in artifacts:
        manifest = artifact.manifest
        start = f"| {artifact.path.name} | {manifest.deploy.size_text} px | {manifest.deploy.precision} |"
        if manifest.kind == "engine":
            rows.append(f"{start} | | | | {manifest.target}: {manifest.facts.run} |")
            continue
        for result in manifest.facts.parity:
            found = result.differences
            same = "" if found.top1_agreement is None else f"{found.top1_agreement:.2%}"
            verdict = "passed" if result.passed else "failed"
            rows.append(
                f"{start} {result.output} | {found.relative_l2_max:.1e} | {same} | {found.samples} | {verdict} |"
            )
        if not manifest.facts.parity:
            rows.append(f"{start} | | | | not compared |")
    return rows
