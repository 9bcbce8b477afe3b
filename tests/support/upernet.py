"""transformers' UPerNet with the weights of ours, by names that are written out here."""

import re

from transformers import ConvNextV2Config, UperNetConfig, UperNetForSemanticSegmentation

from cnx_deploy.model.convnextv2 import ConvNeXtV2

THEIRS = (
    (r"downsample_layers\.0\.0\.", "backbone.embeddings.patch_embeddings."),
    (r"downsample_layers\.0\.1\.", "backbone.embeddings.layernorm."),
    (r"downsample_layers\.(\d)\.", r"backbone.encoder.stages.\1.downsampling_layer."),
    (r"stages\.(\d)\.(\d)\.norm\.", r"backbone.encoder.stages.\1.layers.\2.layernorm."),
    (r"stages\.(\d)\.(\d)\.grn\.gamma", r"backbone.encoder.stages.\1.layers.\2.grn.weight"),
    (r"stages\.(\d)\.(\d)\.grn\.beta", r"backbone.encoder.stages.\1.layers.\2.grn.bias"),
    (r"stages\.(\d)\.(\d)\.", r"backbone.encoder.stages.\1.layers.\2."),
    (r"norm0\.", "backbone.hidden_states_norms.stage1."),
    (r"norm1\.", "backbone.hidden_states_norms.stage2."),
    (r"norm2\.", "backbone.hidden_states_norms.stage3."),
    (r"norm3\.", "backbone.hidden_states_norms.stage4."),
    (r"(decode|auxiliary)_head\.conv_seg\.", r"\1_head.classifier."),
    (r"(decode_head|auxiliary_head)\.(.+)\.bn\.", r"\1.\2.batch_norm."),
)


def transformers_name(name: str) -> str:
    """The name of one of our tensors there."""
    return next((re.sub(f"^{old}", new, name) for old, new in THEIRS if re.match(old, name)), name)


def transformers_upernet(network: ConvNeXtV2) -> UperNetForSemanticSegmentation:
    """Build the network in FP32, in evaluation mode; with an auxiliary head where ours has one."""
    widths, depths, config = list(network.variant.dims), list(network.variant.depths), network.task.config
    backbone = ConvNextV2Config(hidden_sizes=widths, depths=depths, out_features=[f"stage{at}" for at in range(1, 5)])
    theirs = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone,
            hidden_size=config.channels,
            num_labels=network.num_classes,
            use_auxiliary_head=config.auxiliary_channels > 0,
            auxiliary_channels=config.auxiliary_channels,
            auxiliary_in_channels=widths[2],
            auxiliary_num_convs=1,
        )
    )
    theirs.load_state_dict({transformers_name(name): tensor for name, tensor in network.state_dict().items()})
    return theirs.eval()
