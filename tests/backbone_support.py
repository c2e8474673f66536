"""Which vision model types of transformers are supported, as a list with reasons and as the table in docs/backbones.md.

`python tests/backbone_support.py` writes the table anew.
"""

import inspect
import sys
from pathlib import Path

import torch
import transformers
from backbone_zoo import NOT_BUILT, build, inputs, vision_model_types

from hf_layerfusion.layout import BLOCK_MODULES
from hf_layerfusion.model_classes import backbone_class_of
from hf_layerfusion.probe import describe_backbone

# Types that cannot be used, each with its reason. The tests fail if one starts to work, or another one does not.
UNSUPPORTED = {
    **dict.fromkeys(
        (
            *("cohere_compass_vision", "cosmos3_edge_vision", "dots3_note_vision_encoder", "ernie4_5_vl_moe_vision"),
            *("exaone4_5_vision", "gemma4_vision", "glm4v_moe_vision", "glm4v_vision", "glm5_next_vision"),
            *("glm_image_vision", "glm_ocr_vision", "hunyuan_vl_vision", "inkling2_vision", "inkling_vision"),
            *("kimi_k25_vision", "kosmos_2_5_vision_model", "lfm3_vl_vision", "minicpm_ocr_vision"),
            *("minicpmv4_6_vision", "minicpmv4_7_vision", "minimax_m3_vl_vision", "molmo2_vision"),
            *("muse_glimmer_vision", "muse_spark_vision", "paddleocr_vl_vision", "pix2struct_vision_model"),
            *("qwen2_5_omni_vision_encoder", "qwen2_5_vl_vision", "qwen2_vl_vision", "qwen3_5_moe_vision"),
            *("qwen3_5_vision", "qwen3_omni_moe_vision_encoder", "qwen3_vl_moe_vision", "qwen3_vl_vision"),
            *("qwen4_exp_vision", "video_llama_3_vision"),
        ),
        "takes packed patches and their grid, not images",
    ),
    "mllama_vision_model": "takes tiles of an image and their aspect ratios",
    "videoprism_vision_model": "folds the frames of a video into the batch axis in some of its layers only",
}

SUPPORTED = [name for name in vision_model_types() if name not in UNSUPPORTED and name not in NOT_BUILT]

# Where the config does not say it in one number: what the model is made of.
LAYERS = {
    "align_vision_model": lambda model: len(model.encoder.blocks),
    "deepseek_ocr2_vision": lambda model: layers_of(model.config.encoder_config),
    "depth_pro": lambda model: layers_of(model.config.image_model_config),
    "efficientnet": lambda model: len(model.encoder.blocks),
    "groupvit_vision_model": lambda model: len(model.config.depths),
    "mobilenet_v1": lambda model: len(model.layer),
    "mobilenet_v2": lambda model: len(model.layer),
    "mobilevit": lambda model: len(model.encoder.layer),
    "mobilevitv2": lambda model: len(model.encoder.layer),
    "pvt": lambda model: sum(model.config.depths),  # each block is a layer
    "sam2_hiera_det_model": lambda model: sum(model.config.blocks_per_stage),
    "sam2_vision_model": lambda model: sum(model.config.backbone_config.blocks_per_stage),
    "swiftformer": lambda model: 2 * len(model.config.depths) - 1,  # stages, and the downsamplings between them
    "unlimited_ocr_vision": lambda model: layers_of(model.config.encoder_config),
}


def layers_of(config):
    """How many layers a config asks for."""
    config = getattr(config, "backbone_config", None) or config
    for name in ("num_hidden_layers", "num_layers", "n_layers", "depth"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    for name in ("depths", "depth", "hidden_sizes", "stage_numbers"):
        if isinstance(value := getattr(config, name, None), list | tuple):
            return len(value)
    raise AssertionError(f"count the layers of {config.model_type!r} by hand, and add them to LAYERS")


def num_layers_of(model):
    """How many layers a model has, counted without this library."""
    model_type = model.config.model_type
    return LAYERS[model_type](model) if model_type in LAYERS else layers_of(model.config)


def takes(backbone, given, output_hidden_states):
    """Whether transformers' own forward takes these inputs."""
    named = inspect.signature(backbone.forward).parameters
    options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in named else {}
    try:
        with torch.no_grad():
            backbone(**given, **options, output_hidden_states=output_hidden_states)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError):
        return False
    return True


# ---- the table ---------------------------------------------------------------------------------------------------

_HEADER = """# Backbones

Every vision model type that transformers {version} knows, from its own mappings: **{count} model types** work. The
table is written by `python tests/backbone_support.py` from what `describe_backbone` measures on a tiny random model of
each type, and `tests/test_every_backbone.py` checks each row.

- *layers*: of the type's default config. Blocks are numbered one by one; where transformers gives one hidden state per
  stage, layers are stages.
- *special*: tokens beside the patches, before + after them, of a tiny config; they are never averaged.
- *taps*: all eight points of a block (`ln1`, `attention`, `residual`, `ln2`, `fc1`, `activation`, `fc2`, `block`), or
  those that exist. `final_norm` is the norm behind the last block, `pooler` the model's own pooled vector.
- *sizes*: whether images of twice the native size can be read.

| model type | class | layers | activations | special | CLS | taps | final norm | pooler | sizes |
|---|---|---|---|---|---|---|---|---|---|
"""


def measure(model_type):
    backbone = build(model_type)
    return backbone, describe_backbone(backbone)


def write_table(path, measure=measure):
    """Write docs/backbones.md from the tiny backbone of each type and its layout."""
    count = f"{len(SUPPORTED)} of {len(vision_model_types())}"
    lines = [_row(model_type, *measure(model_type)) for model_type in SUPPORTED]
    others = {**UNSUPPORTED, **NOT_BUILT}
    absent = [f"| {name} | {others[name]} |" for name in vision_model_types() if name in others]
    Path(path).write_text(
        _HEADER.format(version=transformers.__version__, count=count)
        + "\n".join(lines)
        + "\n\n## Not supported, or not in this table\n\n| model type | why |\n|---|---|\n"
        + "\n".join(absent)
        + "\n"
    )


def _row(model_type, backbone, layout):
    unit = "blocks" if layout.reading == "blocks" else "stages"
    taps = [module for module in BLOCK_MODULES if module in layout.modules]
    has_cls = [layout.has_cls_at(layer) for layer in range(1, layout.num_layers + 1)]
    native = layout.image_size
    cells = [
        model_type,
        type(backbone).__name__,
        f"{_default_layers(model_type)} {unit}",
        layout.kind("block").replace("_", " ") + ("" if layout.batching == "plain" else f", {layout.batching}"),
        f"{max(layout.num_prefix_tokens)} + {max(layout.num_suffix_tokens)}"
        if layout.kind("block") == "tokens"
        else "",
        "yes" if all(has_cls) else "late" if any(has_cls) else "",
        "all eight" if len(taps) == len(BLOCK_MODULES) else ", ".join(taps),
        "yes" if layout.final_norm else "",
        "yes" if "pooler" in layout.modules else "",
        "any grid" if native is None else _sizes(backbone, layout),
    ]
    return f"| {' | '.join(cells)} |"


def _default_layers(model_type):
    config = transformers.CONFIG_MAPPING[model_type]()
    if model_type not in LAYERS:
        return layers_of(config)
    with torch.device("meta"):
        return LAYERS[model_type](backbone_class_of(config)(config))


def _sizes(backbone, layout):
    other = (layout.image_size[0] * 2, layout.image_size[1] * 2)
    return "yes" if takes(backbone, inputs(backbone, size=other), layout.reading == "hidden_states") else "fixed"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    target = Path(__file__).parent.parent / "docs" / "backbones.md"
    write_table(target)
    print(f"wrote {target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}", file=sys.stderr)
