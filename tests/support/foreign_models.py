"""Other libraries' ConvNeXt V2 of any size, and the reference autoencoder's file layout."""

import itertools
import math
import re
from pathlib import Path

import torch
import torchvision
import transformers
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from cnx_deploy.core.variants import Variant
from cnx_deploy.model.convnextv2 import ConvNeXtV2

State = dict[str, Tensor]


def assert_same_weights(loaded: ConvNeXtV2, expected: ConvNeXtV2) -> None:
    torch.testing.assert_close(loaded.state_dict(), expected.state_dict(), rtol=0, atol=0)


def saved(content: object, path: Path) -> Path:
    """Write a state dict as the path's suffix says."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def timm_model(variant: Variant, num_classes: int = 10, in_chans: int = 3) -> ConvNeXt:
    blocks = {"use_grn": True, "ls_init_value": None} if variant.version == 2 else {}
    return ConvNeXt(
        in_chans=in_chans, depths=variant.depths, dims=variant.dims, num_classes=num_classes, **blocks
    ).eval()


def transformers_model(variant: Variant, num_classes: int = 10) -> transformers.PreTrainedModel:
    name = f"ConvNext{'V2' if variant.version == 2 else ''}"
    config = getattr(transformers, f"{name}Config")(
        depths=list(variant.depths), hidden_sizes=list(variant.dims), num_labels=num_classes
    )
    return getattr(transformers, f"{name}ForImageClassification")(config).eval()


def torchvision_model(variant: Variant, num_classes: int = 10) -> nn.Module:
    """torchvision's ConvNeXt V1 of any size."""
    widths = [*variant.dims, None]
    stages = [
        torchvision.models.convnext.CNBlockConfig(width, after, depth)
        for width, after, depth in zip(widths, widths[1:], variant.depths, strict=False)
    ]
    return torchvision.models.ConvNeXt(stages, num_classes=num_classes).eval()


class MmNorm(nn.LayerNorm):
    """A norm over channels that come first."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MmResponse(nn.Module):
    """GRN as mmpretrain names it: gamma and beta (C,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, maps: Tensor) -> Tensor:
        norm = maps.square().sum(dim=(1, 2), keepdim=True).sqrt()
        return self.gamma * maps * norm / (norm.mean(dim=-1, keepdim=True) + 1e-6) + self.beta + maps


class MmBlock(nn.Module):
    """A block under mmpretrain's names (mmpretrain/models/backbones/convnext.py)."""

    def __init__(self, width: int, version: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = MmNorm(width, eps=1e-6)
        self.pointwise_conv1, self.pointwise_conv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.grn = MmResponse(4 * width) if version == 2 else nn.Identity()
        self.gamma = nn.Parameter(torch.ones(width)) if version == 1 else None

    def forward(self, maps: Tensor) -> Tensor:
        hidden = self.pointwise_conv1(self.norm(self.depthwise_conv(maps)).permute(0, 2, 3, 1))
        branch = self.pointwise_conv2(self.grn(nn.functional.gelu(hidden))).permute(0, 3, 1, 2)
        return maps + (branch if self.gamma is None else branch * self.gamma.view(1, -1, 1, 1))


class MmClassifier(nn.Module):
    """mmpretrain's classifier: `backbone` with a norm for each output, the last one pooled before, and `head.fc`."""

    def __init__(self, variant: Variant, num_classes: int = 10, outputs: tuple[int, ...] = (3,)) -> None:
        super().__init__()
        self.outputs, backbone, widths = outputs, nn.Module(), variant.dims
        stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), MmNorm(widths[0], eps=1e-6))
        later = [
            nn.Sequential(MmNorm(before, eps=1e-6), nn.Conv2d(before, after, 2, 2))
            for before, after in itertools.pairwise(widths)
        ]
        backbone.downsample_layers = nn.ModuleList([stem, *later])
        backbone.stages = nn.ModuleList(
            nn.Sequential(*(MmBlock(width, variant.version) for _ in range(depth)))
            for depth, width in zip(variant.depths, widths, strict=True)
        )
        for level in outputs:
            backbone.add_module(f"norm{level}", MmNorm(widths[level], eps=1e-6))
        self.backbone = backbone
        self.head = nn.Module()
        self.head.fc = nn.Linear(widths[3], num_classes)

    def forward(self, maps: Tensor) -> Tensor:
        for downsample, stage in zip(self.backbone.downsample_layers, self.backbone.stages, strict=True):
            maps = stage(downsample(maps))
        return self.head.fc(self.backbone.norm3(maps.mean(dim=(2, 3), keepdim=True)).flatten(1))


class MmConvModule(nn.Sequential):
    """mmcv's ConvModule: convolution without bias, batch norm, ReLU, under the names `conv` and `bn`."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.activate = nn.ReLU()


class MmSegmentor(nn.Module):
    """mmseg's EncoderDecoder with UPerHead and FCNHead (mmseg/models/decode_heads/uper_head.py and fcn_head.py)."""

    def __init__(
        self, variant: Variant, num_classes: int = 5, channels: int = 16, auxiliary: int = 8, *, scales=(1, 2, 3, 6)
    ) -> None:
        super().__init__()
        widths = variant.dims
        self.backbone = MmClassifier(variant, outputs=(0, 1, 2, 3)).backbone
        head = self.decode_head = nn.Module()
        head.conv_seg = nn.Conv2d(channels, num_classes, 1)
        head.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), MmConvModule(widths[3], channels, 1)) for scale in scales
        )
        head.bottleneck = MmConvModule(widths[3] + len(scales) * channels, channels, 3)
        head.lateral_convs = nn.ModuleList(MmConvModule(width, channels, 1) for width in widths[:3])
        head.fpn_convs = nn.ModuleList(MmConvModule(channels, channels, 3) for _ in range(3))
        head.fpn_bottleneck = MmConvModule(4 * channels, channels, 3)
        if auxiliary:
            self.auxiliary_head = nn.Module()
            self.auxiliary_head.conv_seg = nn.Conv2d(auxiliary, num_classes, 1)
            self.auxiliary_head.convs = nn.Sequential(MmConvModule(widths[2], auxiliary, 3))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        def resized(maps: Tensor, like: Tensor) -> Tensor:
            return nn.functional.interpolate(maps, like.shape[2:], mode="bilinear", align_corners=False)

        head, levels = self.decode_head, mm_levels(self.backbone, images)
        pooled = [levels[3], *(resized(module(levels[3]), levels[3]) for module in head.psp_modules)]
        laterals = [conv(level) for conv, level in zip(head.lateral_convs, levels, strict=False)]
        laterals.append(head.bottleneck(torch.cat(pooled, dim=1)))
        for at in (3, 2, 1):
            laterals[at - 1] = laterals[at - 1] + resized(laterals[at], laterals[at - 1])
        outs = [conv(lateral) for conv, lateral in zip(head.fpn_convs, laterals, strict=False)] + laterals[3:]
        joined = head.fpn_bottleneck(torch.cat([resized(each, outs[0]) for each in outs], dim=1))
        outputs = {"logits": head.conv_seg(joined)}
        if hasattr(self, "auxiliary_head"):
            outputs["auxiliary_logits"] = self.auxiliary_head.conv_seg(self.auxiliary_head.convs(levels[2]))
        return outputs


class MmDetector(nn.Module):
    """mmdet's MaskRCNN, or FasterRCNN without `masks`, in evaluation: its modules' names and its arithmetic.

    Sources: mmdet/models, necks/fpn.py, dense_heads/rpn_head.py, task_modules/prior_generators/anchor_generator.py,
    task_modules/coders/delta_xywh_bbox_coder.py, roi_heads/roi_extractors/single_level_roi_extractor.py,
    roi_heads/bbox_heads/convfc_bbox_head.py, layers/bbox_nms.py, roi_heads/mask_heads/fcn_mask_head.py, with the
    values of configs/convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py.
    """

    def __init__(self, variant: Variant, classes: int = 5, channels: int = 16, wide: int = 32, *, masks: bool = True):
        super().__init__()
        self.backbone, self.classes = MmClassifier(variant, outputs=(0, 1, 2, 3)).backbone, classes

        def conv(inputs: int, outputs: int, kernel: int) -> nn.Module:
            holder = nn.Module()
            holder.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
            return holder

        self.neck, self.rpn_head, self.roi_head = nn.Module(), nn.Module(), nn.Module()
        self.neck.lateral_convs = nn.ModuleList(conv(width, channels, 1) for width in variant.dims)
        self.neck.fpn_convs = nn.ModuleList(conv(channels, channels, 3) for _ in variant.dims)
        self.rpn_head.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_head.rpn_cls, self.rpn_head.rpn_reg = nn.Conv2d(channels, 3, 1), nn.Conv2d(channels, 12, 1)
        head = self.roi_head.bbox_head = nn.Module()
        head.shared_fcs = nn.ModuleList([nn.Linear(49 * channels, wide), nn.Linear(wide, wide)])
        head.fc_cls, head.fc_reg = nn.Linear(wide, classes + 1), nn.Linear(wide, 4 * classes)
        if masks:
            head = self.roi_head.mask_head = nn.Module()
            head.convs = nn.ModuleList(conv(channels, channels, 3) for _ in range(4))
            head.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
            head.conv_logits = nn.Conv2d(channels, classes, 1)

    def forward(self, image: Tensor) -> State:
        """One image (1, 3, H, W) -> boxes (n, 4), scores (n,), labels (n,) from 0 and masks (n, 28, 28)."""
        canvas, levels = image.shape[2:], self._pyramid(mm_levels(self.backbone, image))
        proposals = self._proposals(levels, canvas)
        head = self.roi_head.bbox_head
        hidden = self._aligned(levels, proposals, 7).flatten(1)
        for dense in head.shared_fcs:
            hidden = dense(hidden).relu()
        scores = head.fc_cls(hidden).softmax(dim=1)[:, : self.classes]  # the background is the last
        changes = head.fc_reg(hidden).reshape(-1, self.classes, 4) * hidden.new_tensor([0.1, 0.1, 0.2, 0.2])
        boxes = mm_decoded(proposals[:, None].expand_as(changes), changes, canvas)
        rows, labels = torch.where(scores > 0.05)
        boxes, scores = boxes[rows, labels], scores[rows, labels]
        kept = torchvision.ops.batched_nms(boxes, scores, labels, 0.5)[:100]
        found = {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
        if hasattr(self.roi_head, "mask_head"):
            head, hidden = self.roi_head.mask_head, self._aligned(levels, found["boxes"], 14)
            for each in head.convs:
                hidden = each.conv(hidden).relu()
            logits = head.conv_logits(head.upsample(hidden).relu())
            found["masks"] = logits[torch.arange(len(kept)), found["labels"]].sigmoid()
        return found

    def _pyramid(self, maps: list[Tensor]) -> list[Tensor]:
        laterals = [each.conv(level) for each, level in zip(self.neck.lateral_convs, maps, strict=True)]
        for at in (3, 2, 1):
            laterals[at - 1] = laterals[at - 1] + nn.functional.interpolate(laterals[at], laterals[at - 1].shape[2:])
        outs = [each.conv(lateral) for each, lateral in zip(self.neck.fpn_convs, laterals, strict=True)]
        return [*outs, nn.functional.max_pool2d(outs[-1], 1, stride=2)]

    def _proposals(self, levels: list[Tensor], canvas: tuple[int, int]) -> Tensor:
        every: tuple[list[Tensor], ...] = ([], [], [])
        for number, level in enumerate(levels):
            hidden, stride = self.rpn_head.rpn_conv(level).relu(), 4 << number
            scores = self.rpn_head.rpn_cls(hidden)[0].permute(1, 2, 0).flatten().sigmoid()
            changes = self.rpn_head.rpn_reg(hidden)[0].permute(1, 2, 0).reshape(-1, 4)
            ratios = level.new_tensor([0.5, 1.0, 2.0]).sqrt()
            wide, high = 8 * stride / ratios, 8 * stride * ratios
            base = torch.stack([-wide, -high, wide, high], dim=1) / 2
            across, down = (torch.arange(side) * stride for side in (level.shape[3], level.shape[2]))
            y, x = torch.meshgrid(down, across, indexing="ij")
            anchors = (torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4) + base).reshape(-1, 4)
            best = scores.sort(descending=True).indices[:1000]
            every[0].append(mm_decoded(anchors[best], changes[best], canvas))
            every[1].append(scores[best])
            every[2].append(torch.full_like(best, number))
        boxes, scores, numbers = map(torch.cat, every)
        large = (boxes[:, 2:] - boxes[:, :2] > 0).all(dim=1)  # min_bbox_size 0
        boxes, scores, numbers = boxes[large], scores[large], numbers[large]
        return boxes[torchvision.ops.batched_nms(boxes, scores, numbers, 0.7)[:1000]]

    def _aligned(self, levels: list[Tensor], boxes: Tensor, side: int) -> Tensor:
        scale = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        numbers = (scale / 56 + 1e-6).log2().floor().clamp(0, 3)
        aligned = boxes.new_zeros(len(boxes), levels[0].shape[1], side, side)
        for number in range(4):
            at = numbers == number
            rois, words = [boxes[at]], (side, 1 / (4 << number), 0, True)  # sampling ratio 0, aligned
            aligned[at] = torchvision.ops.roi_align(levels[number], rois, *words)
        return aligned


def mm_decoded(boxes: Tensor, changes: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Changes of boxes (…, 4) as DeltaXYWHBBoxCoder applies them, inside the canvas."""
    most = abs(math.log(16 / 1000))
    corner, other = boxes.split(2, dim=-1)
    moves, growths = changes.split(2, dim=-1)
    centre = (corner + other) / 2 + (other - corner) * moves
    size = (other - corner) * growths.clamp(-most, most).exp()
    limits = boxes.new_tensor([canvas[1], canvas[0]] * 2)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(min=0).minimum(limits)


def mm_levels(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """The outputs of the four stages, each normalised, as mmpretrain's ConvNeXt gives them to a neck or a head."""
    levels = []
    for at, (downsample, stage) in enumerate(zip(backbone.downsample_layers, backbone.stages, strict=True)):
        images = stage(downsample(images))
        levels.append(backbone.get_submodule(f"norm{at}")(images))
    return levels


def official_backbone(state: State) -> State:
    """The names of facebookresearch/ConvNeXt's segmentation and detection, whose backbone has the official blocks."""
    changes = (("depthwise_conv", "dwconv"), ("pointwise_conv", "pwconv"))
    return {
        (name.replace(*changes[0]).replace(*changes[1]) if name.startswith("backbone.") else name): tensor
        for name, tensor in state.items()
    }


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter random, none of them zero, logits of the order of one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator)
            is_kernel = parameter.ndim in (2, 4) and "grn" not in name
            parameter.mul_(parameter[0].numel() ** -0.5 if is_kernel else 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(7)
    return model


def fcmae_state(model: ConvNeXtV2) -> State:
    """The masked autoencoder's state dict: the inverse of the reference's `remap_checkpoint_keys`, and a decoder."""
    encoder = {
        name: _sparse(name, tensor)
        for name, tensor in model.state_dict().items()
        if not name.startswith(("norm.", "head."))
    }
    width = model.variant.dims[-1]
    decoder = {
        "mask_token": torch.zeros(1, 512, 1, 1),
        "proj.weight": torch.ones(512, width, 1, 1),
        "proj.bias": torch.ones(512),
        "decoder.0.dwconv.weight": torch.ones(512, 1, 7, 7),
        "decoder.0.grn.gamma": torch.ones(1, 1, 1, 2048),
        "pred.weight": torch.ones(3072, 512, 1, 1),
        "pred.bias": torch.ones(3072),
    }
    return {f"encoder.{name}": tensor for name, tensor in encoder.values()} | decoder


def _sparse(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    module, _, kind = name.rpartition(".")
    if module.startswith("downsample_layers.0."):  # the stem is dense there too
        return name, tensor
    if module.endswith(".grn"):
        return name, tensor.reshape(1, -1)
    if ".pwconv" in module:
        return f"{module}.linear.{kind}", tensor
    if module.endswith(".norm") or re.fullmatch(r"downsample_layers\.\d\.0", module):
        return f"{module}.ln.{kind}", tensor
    if kind == "bias":
        return name, tensor.reshape(1, -1)
    outputs, inputs, height, width = tensor.shape
    kernel = tensor.transpose(2, 3).reshape(outputs, inputs, height * width).permute(2, 1, 0)
    return f"{module}.kernel", kernel.squeeze(1) if ".dwconv" in name else kernel


def reference_remap(state: State) -> State:
    """What the reference makes of the encoder's names and shapes, position by position, independent of ours."""
    remapped = {}
    for name, tensor in state.items():
        parts = [part for part in name.split(".") if part not in ("ln", "linear")]
        if parts[0] != "encoder":
            continue
        if parts[-1] == "kernel":
            parts[-1], tensor = "weight", _dense(tensor)
        elif parts[-1] == "bias":
            tensor = tensor.reshape(-1)
        elif parts[-2] == "grn":
            tensor = tensor[None, None]
        remapped[".".join(parts[1:])] = tensor
    return remapped


def _dense(kernel: Tensor) -> Tensor:
    kernel = kernel[:, None] if kernel.ndim == 2 else kernel  # (K·K, I, O)
    side = int(kernel.shape[0] ** 0.5)
    dense = torch.empty(kernel.shape[2], kernel.shape[1], side, side)
    for position, matrix in enumerate(kernel):
        column, row = divmod(position, side)
        dense[:, :, row, column] = matrix.T
    return dense
