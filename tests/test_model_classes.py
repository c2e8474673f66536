"""Which class a config's backbone has, which of its nested configs is the vision tower, and where pixels go in."""

from __future__ import annotations

import pytest
from backbone_zoo import build, tiny_config
from modeling_helpers import ScriptedConfig
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    BertModel,
    CLIPModel,
    PreTrainedConfig,
    SamModel,
    UperNetForSemanticSegmentation,
    VisionEncoderDecoderConfig,
    ViTConfig,
    ViTForImageClassification,
)

from hf_layerfusion.model_classes import backbone_class_of, pixel_argument, vision_config_of, vision_tower_of

BACKBONES = {
    # What AutoModel opens.
    "vit": "ViTModel",
    "clip_vision_model": "CLIPVisionModel",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "vjepa2": "VJEPA2Model",
    # AutoModel opens a task head.
    "mgp-str": "MgpstrModel",
    # Only AutoBackbone knows them.
    "lw_detr_vit": "LwDetrViTBackbone",
    "pp_lcnet": "PPLCNetBackbone",
    # In no mapping of transformers; two of them stand beside other models of the same config.
    "blip_vision_model": "BlipVisionModel",
    "owlvit_vision_model": "OwlViTVisionModel",
    "metaclip_2_vision_model": "MetaClip2VisionModel",
    "bridgetower_vision_model": "BridgeTowerVisionModel",
    # Up to transformers 5.17 it inherits the composite's config class; its constructor names the right one.
    "deepseek_ocr2_vision": "DeepseekOcr2VisionModel",
}
NO_BACKBONES = {
    "text": "bert",
    "audio": "wav2vec2",
    "image and text": "clip",
    "image, text and a tower of the same module": "pp_formulanet",
    "image and layout": "layoutlmv3",
    "prompts": "sam",
    "detector": "detr",
    "segmenter": "mask2former",
    "matcher": "efficientloftr",
    "task heads only": "depth_anything",
    "codebook": "janus_vqgan",
    "model whose config belongs to no class": "layoutxlm",
}
TOWERS = {
    "clip": "clip_vision_model",
    "siglip2": "siglip2_vision_model",
    "blip-2": "blip_2_vision_model",
    "flava": "flava_image_model",  # image_config
    "llava": "clip_vision_model",
    "colpali": "siglip_vision_model",  # vlm_config, and vision_config in that
    "sam": "sam_vision_model",
    "qwen2_5_omni": "qwen2_5_omni_vision_encoder",  # thinker_config, and vision_config in that
    "depth_anything": "dinov2",  # backbone_config
}


@pytest.mark.parametrize("model_type", BACKBONES)
def test_the_backbone_class_of_a_config(model_type):
    config_class = CONFIG_MAPPING[model_type]
    assert backbone_class_of(config_class).__name__ == BACKBONES[model_type]


@pytest.mark.parametrize("model_type", NO_BACKBONES.values(), ids=NO_BACKBONES.keys())
def test_a_config_without_a_backbone_class(model_type):
    assert backbone_class_of(CONFIG_MAPPING[model_type]) is None


@pytest.mark.parametrize("model_type", TOWERS)
def test_the_vision_config_of_a_composite(model_type):
    assert vision_config_of(CONFIG_MAPPING[model_type]()).model_type == TOWERS[model_type]


def test_the_encoder_of_an_encoder_decoder_is_its_vision_config():
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(num_hidden_layers=2), BertConfig())
    assert vision_config_of(config).num_hidden_layers == 2


@pytest.mark.parametrize("model_type", ["vit", "bert", "sam2_vision_model"])
def test_a_config_without_a_tower_inside_is_its_own_vision_config(model_type):
    config = CONFIG_MAPPING[model_type]()
    assert vision_config_of(config) is config


@pytest.mark.parametrize(
    ("model_class", "model_type", "tower"),
    [
        (ViTForImageClassification, "vit", "ViTModel"),
        (CLIPModel, "clip", "CLIPVisionModel"),
        (SamModel, "sam", "SamVisionModel"),
        (UperNetForSemanticSegmentation, "upernet", "ResNetModel"),
    ],
)
def test_the_vision_tower_inside_a_model(model_class, model_type, tower):
    model = model_class(tiny_config(model_type))
    found = vision_tower_of(model)
    assert type(found).__name__ == tower
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in found.parameters()} <= weights  # not copies
    assert not any(tensor.device.type == "meta" for tensor in [*found.parameters(), *found.buffers()])


@pytest.mark.parametrize("model", [lambda: build("vit"), lambda: BertModel(tiny_config("bert"))], ids=["vit", "bert"])
def test_a_model_without_a_tower_inside_is_its_own_tower(model):
    model = model()
    assert vision_tower_of(model) is model


class RemoteConfig(PreTrainedConfig):
    """A composite of code outside transformers, which does not declare its parts."""

    model_type = "remote"

    def __init__(self, vision_config: PreTrainedConfig | None = None, **kwargs: object):
        super().__init__(**kwargs)
        self.vision_config = vision_config


def test_configs_from_outside_transformers():
    tower, unknown = ViTConfig(), ScriptedConfig()
    remote = RemoteConfig(vision_config=unknown)
    assert backbone_class_of(unknown) is None
    assert vision_config_of(remote) is remote
    assert vision_config_of(RemoteConfig(vision_config=tower)) is tower


@pytest.mark.parametrize(
    ("model_type", "argument"),
    [
        ("vit", "pixel_values"),
        ("videomae", "pixel_values"),
        ("vjepa2", "pixel_values_videos"),
        ("bridgetower_vision_model", "image"),
        ("pix2struct_vision_model", "flattened_patches"),
        ("qwen2_vl_vision", "hidden_states"),
    ],
)
def test_the_argument_that_takes_pixels(model_type, argument):
    assert pixel_argument(backbone_class_of(CONFIG_MAPPING[model_type])) == argument


def test_the_pixels_of_instances_and_of_text_models():
    assert pixel_argument(build("vit")) == "pixel_values"
    assert pixel_argument(BertModel) is None
