"""A tiny random backbone of every vision model type that the installed transformers knows."""

from __future__ import annotations

import inspect
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from modeling_helpers import randomise
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from hf_layerfusion.model_classes import backbone_class_of, pixel_argument

# What the fields of a config become, by name and by whether they hold a number or a list. Lists are cut to length.
_NUMBERS: dict[str, float] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "fpn_hidden_size"), 32),
    **dict.fromkeys(
        ("out_hidden_size", "text_hidden_size", "projection_hidden_dim", "projection_intermediate_size"), 32
    ),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "d_ff", "pred_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "depth", "n_layers"), 3),
    **dict.fromkeys(("num_spatial_layers", "num_temporal_layers", "pred_num_hidden_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "attention_heads", "num_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("image_size", "pretrain_image_size", "crop_size"), 32),
    **dict.fromkeys(("head_dim", "d_kv", "patch_size", "embedding_size", "groups_width", "num_groups"), 8),
    **dict.fromkeys(("output_channels", "head_out_channels", "post_conv_in_channels", "post_conv_mid_channels"), 16),
    "stem_out_channels": 8,
    "num_patches": 16,
    "hidden_dim": 320,  # of EfficientNet: 1280 times its width
    **dict.fromkeys(("depth_coefficient", "width_coefficient", "depth_multiplier", "width_multiplier"), 0.25),
    **dict.fromkeys(("num_frames", "frames_per_clip"), 4),
    "num_register_tokens": 2,
    "num_position_embeddings": 64,
    "pred_num_attention_heads": 4,
    "window_size": 2,
    "mlp_ratio": 2,
}
_LISTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("depths", "blocks_per_stage", "num_block_repeats", "n_attn_blocks"), (2, 1, 1, 1, 1, 1, 1)),
    **dict.fromkeys(("hidden_sizes", "embed_dims", "embed_dim", "embed_dim_per_stage"), (8, 16, 24, 32, 32)),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_attention_heads_per_stage"), (1, 2, 2, 4, 4, 4)),
    "image_size": (32, 32),
    "patch_size": (8, 8),
    "key_dim": (4, 4, 4),
    "global_attn_indexes": (1,),
    "downsample_channels": (16, 32),
}
# Backbones with stages halve their maps several times: they keep their small patches and get a larger image.
_STAGE_FIELDS = ("depths", "hidden_sizes", "embed_dim", "blocks_per_stage", "base_attn_unit_dims")
_STAGED_NUMBERS = {"image_size": 64, "patch_size": None, "embed_dim": 8}
_STAGED_LISTS = {"image_size": (64, 64), "patch_size": None}

_CONVOLUTIONS = [
    f"{kind}_{ratio}ratio"
    for kind in ("vertical_long_to_small_conv", "horizontal_small_to_long_conv", "symmetric_conv_long")
    for ratio in ("long", "mid", "short")
]
_ALL_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
_DETECTION_NECK = {
    "neck_out_channels": 32,
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{name: [3, 1, 1] for name in _CONVOLUTIONS},
    },
}


def _lcnet_blocks(stride: int | list[int]) -> list[list[list[Any]]]:
    """Four stages of PP-LCNet v4: kernel size, channels in and out, stride, whether there is squeeze-and-excitation."""
    return [
        [[3, 16, 16, 1, True]],
        [[3, 16, 16, stride if stride == 2 else 1, False]],
        [[3, 16, 24, stride, False], [3, 24, 24, 1, True]],
        [[3, 24, 32, stride, False]],
    ]


# Types whose own constraints the rule above does not meet.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bridgetower_vision_model": {"hidden_size": 64},  # heads are 64 wide
    "cvt": {"depth": [1, 2, 3]},  # stage k reads its drop rate at depth k
    "depth_pro": {
        "patch_size": 32,
        "intermediate_hook_ids": [2, 1],
        "intermediate_feature_dims": [16, 16],
        "scaled_images_feature_dims": [32, 32, 16],
        "fusion_hidden_size": 16,
        "merge_padding_value": 1,
    },
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "hgnet_v2": {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 24, 32],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 24, 32, 48],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    # Four neighbouring tokens are joined before the last MLP.
    "llama4_vision_model": {"intermediate_size": 128, "projector_input_dim": 64, "projector_output_dim": 64},
    "lw_detr_vit": {"num_windows": 4, "num_windows_side": 2},
    "pp_lcnet": {"scale": 0.25},
    "pp_lcnet_v3": {"scale": 0.25},
    "pp_lcnet_v4": {"stem_channels": [3, 8, 16], "block_configs": _lcnet_blocks([2, 1])},
    "pp_ocrv5_server_det": _DETECTION_NECK,
    "pp_ocrv6_medium_det": _DETECTION_NECK | {"backbone_config": _ALL_STAGES | {"block_configs": _lcnet_blocks(2)}},
    "pp_ocrv6_small_det": {
        "layer_list_out_channels": [16, 16, 24, 32],
        "backbone_config": _ALL_STAGES | {"block_configs": _lcnet_blocks(2)},
    },
    "sam2_hiera_det_model": {
        "hidden_size": 8,
        "window_size_per_stage": [4, 2, 2, 2],
        "window_positional_embedding_background_size": [4, 4],
        "global_attention_blocks": [1],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [32, 24, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "swin2sr": {"image_size": 16},
    "uvdoc": {"backbone_config": {"out_features": [f"stage{stage}" for stage in range(1, 7)]}},
}

# Types that cannot be built here, and why.
NOT_BUILT: dict[str, str] = {
    "dinat": "not tested: needs natten",
    **dict.fromkeys(
        ("edgetam_vision_model", "gemma3n_vision", "pe_video_encoder", "timm_backbone"),
        "not tested: wraps a timm model, and needs timm",
    ),
    "timm_wrapper": "works; tested in a process of its own, which has timm (`tests/test_backbone_options.py`)",
}

# Words of which every vision model's source has one.
_PIXEL_WORDS = ("pixel_values", "flattened_patches", "grid_thw")

# Packed patches that no argument gives away.
_PACKED = ("inkling_vision", "molmo2_vision")

# The side of the images of types whose config does not say it.
_IMAGE_SIDE = 64
_IMAGE_SIZES = {"depth_pro": (128, 128), "pp_ocrv5_mobile_rec": (96, 96)}


@cache
def vision_model_types() -> tuple[str, ...]:
    """Every model type of transformers whose models turn images or videos into hidden states."""
    return tuple(sorted(name for name in CONFIG_MAPPING if _is_vision_backbone(name)))


def _is_vision_backbone(model_type: str) -> bool:
    try:
        config_class = CONFIG_MAPPING[model_type]
    except ImportError:  # the config itself needs a package that is not installed
        return False
    if config_class.model_type != model_type:  # a second name of another type
        return False
    modeling = Path(inspect.getfile(config_class).replace("configuration_", "modeling_"))
    if modeling.is_file() and not any(word in modeling.read_text("utf-8") for word in _PIXEL_WORDS):
        return False  # importing every text and audio model would take several seconds
    return backbone_class_of(config_class) is not None


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A small config of this type; the overrides of a nested config are a dict of its fields."""
    return _shrink(CONFIG_MAPPING[model_type](), overrides)


def _shrink(config: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    overrides = OVERRIDES.get(config.model_type, {}) | overrides
    nested = {name: getattr(config, name, None) for name in config.sub_configs or {}}
    nested = {name: value for name, value in nested.items() if isinstance(value, PreTrainedConfig)}
    fields = {name: value for name, value in config.to_dict().items() if name not in nested}
    staged = any(isinstance(fields.get(name), (list, tuple)) for name in _STAGE_FIELDS)
    values = {name: _shrunk(name, value, staged) for name, value in fields.items()}
    values = {name: value for name, value in values.items() if value is not None}
    # A nested config may differ from the default of its type.
    default = type(config)().to_dict()
    values |= {name: value for name, value in fields.items() if name not in values and value != default.get(name)}
    shrunk = {name: _shrink(value, overrides.get(name, {})) for name, value in nested.items()}
    return type(config)(**values | overrides | shrunk)


def _shrunk(name: str, value: Any, staged: bool) -> Any:
    if isinstance(value, (list, tuple)):
        new = (_LISTS | _STAGED_LISTS if staged else _LISTS).get(name)
        return new and list(new[: len(value)])
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        new = (_NUMBERS | _STAGED_NUMBERS if staged else _NUMBERS).get(name)
        return new and type(value)(new)
    return None


def build(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A tiny backbone of this type, in eval mode and float32, the same one for every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        config = tiny_config(model_type, **overrides)
        model = backbone_class_of(config)(config)
        _tame(randomise(model))
        _measure_batch_norms(model)
    return model.float().eval()


def _tame(model: nn.Module) -> None:
    """Keep activations in range through deep nets."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() == 1 and name.endswith("scale"):
                parameter.add_(1)  # a gain near nothing would hide the image behind what is added to it
            elif parameter.ndim > 1:
                fan_in = parameter.numel() // max(1, parameter.shape[0])
                parameter.mul_(min(1.0, 5 / math.sqrt(max(1, fan_in))))


def _measure_batch_norms(model: PreTrainedModel) -> None:
    """Give BatchNorm the statistics of random images, else the images drown in its biases within a few layers."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None  # the plain mean over all batches, of which there is one
    with torch.no_grad():
        model(**inputs(model, batch_size=8, seed=0))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def inputs(
    model: PreTrainedModel, batch_size: int = 2, size: int | tuple[int, int] | None = None, seed: int = 7
) -> dict[str, Tensor]:
    """Random inputs that this model accepts, at the size it was built for or at `size`.

    Raises:
        NotImplementedError: for a model that takes the patches of all images packed into one row.
    """
    config = model.config
    name = pixel_argument(model)
    if _takes_packed_patches(model, name):
        raise NotImplementedError(f"{type(model).__name__} takes packed patches")
    native = getattr(config, "image_size", None) or getattr(config, "crop_size", None) or _IMAGE_SIDE
    height, width = _pair(size or _IMAGE_SIZES.get(config.model_type) or native)
    generator = torch.Generator().manual_seed(seed)
    if "spatial_shapes" in inspect.signature(model.forward).parameters:
        patch = config.patch_size
        grid = (height // patch, width // patch)
        return {
            name: torch.randn(batch_size, math.prod(grid), 3 * patch**2, generator=generator),
            "pixel_attention_mask": torch.ones(batch_size, math.prod(grid), dtype=torch.long),
            "spatial_shapes": torch.tensor([grid] * batch_size),
        }
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    if config.model_type == "xclip_vision_model":  # the frames of all clips in one batch
        return {name: torch.randn(batch_size * frames, 3, height, width, generator=generator)}
    leading = (batch_size, frames) if frames else (batch_size,)
    return {name: torch.randn(*leading, 3, height, width, generator=generator)}


def _takes_packed_patches(model: PreTrainedModel, pixels: str) -> bool:
    named = inspect.signature(model.forward).parameters
    packing = {"grid_thw", "image_grid_thw", "pixel_position_ids", "target_sizes", "aspect_ratio_ids"}
    return pixels == "flattened_patches" or bool(packing & {*named}) or model.config.model_type in _PACKED


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)[-2:]
