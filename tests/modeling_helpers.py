"""Tiny random backbones, shared by the tests. Every parameter is random, so that nothing is right by being trivial."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    BeitConfig,
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SamVisionConfig,
    SamVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)
from transformers.utils import ModelOutput

from hf_layerfusion import ViTForAttentiveLayerFusionClassification

IMAGE_SIZE, PATCH_SIZE, HIDDEN_SIZE, NUM_LAYERS = 32, 8, 32, 3
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
NUM_REGISTERS = 2

TINY = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
# The DINOv2 family has a ratio where the others have a width.
_TINY_DINOV2 = {key: value for key, value in TINY.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}
# Windows of 3 neither cover nor divide maps of 16, 8 and 4; the last block of the first stage shifts them.
_WINDOWS = {"embed_dim": 8, "depths": [2, 1, 1], "num_heads": [2, 2, 2], "window_size": 3}
_WINDOWS |= {"image_size": IMAGE_SIZE, "patch_size": 2}

# ViTs of which every layer is one block, by model type.
TABLE_BACKBONES: dict[str, Callable[[], PreTrainedModel]] = {
    "beit": lambda: BeitModel(BeitConfig(**TINY, use_relative_position_bias=True, use_mean_pooling=False)),
    "clip_vision_model": lambda: CLIPVisionModel(CLIPVisionConfig(**TINY)),
    "data2vec-vision": lambda: Data2VecVisionModel(
        Data2VecVisionConfig(**TINY, use_relative_position_bias=True, use_mean_pooling=False)
    ),
    "deit": lambda: DeiTModel(DeiTConfig(**TINY)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**_TINY_DINOV2)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**_TINY_DINOV2, num_register_tokens=NUM_REGISTERS)
    ),
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**TINY, num_register_tokens=NUM_REGISTERS)),
    "ijepa": lambda: IJepaModel(IJepaConfig(**TINY)),
    "siglip_vision_model": lambda: SiglipVisionModel(SiglipVisionConfig(**TINY)),
    "vit": lambda: ViTModel(ViTConfig(**TINY)),
    "vit_mae": lambda: ViTMAEModel(ViTMAEConfig(**TINY)),
}

# Backbones of other shapes: stages, maps, windows, post-norm, gated.
OTHER_BACKBONES: dict[str, Callable[[], PreTrainedModel]] = {
    "aimv2_vision_model": lambda: Aimv2VisionModel(Aimv2VisionConfig(**TINY)),
    "convnext": lambda: ConvNextModel(ConvNextConfig(**_STAGES, image_size=IMAGE_SIZE)),
    "resnet": lambda: ResNetModel(ResNetConfig(**_STAGES, embedding_size=8)),
    "sam_vision_model": lambda: SamVisionModel(
        SamVisionConfig(
            **{key: value for key, value in TINY.items() if key != "intermediate_size"},
            mlp_dim=64,
            output_channels=16,
            window_size=0,
            global_attn_indexes=list(range(NUM_LAYERS)),
        )
    ),
    "swin": lambda: SwinModel(SwinConfig(**_WINDOWS)),
    "swinv2": lambda: Swinv2Model(Swinv2Config(**_WINDOWS | {"window_size": 4})),  # padding is NaN in float16
    "vit_msn": lambda: ViTMSNModel(ViTMSNConfig(**TINY)),
}


def tiny_backbone(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny backbone in eval mode, the same one for every call."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(1234)
    model = randomise((TABLE_BACKBONES | OTHER_BACKBONES)[model_type]())
    torch.set_rng_state(generator_state)
    return model.to(dtype).eval()


def build_attending_model(**options: object) -> ViTForAttentiveLayerFusionClassification:
    """A head of three classes on a tiny DINOv2, far from uniform attention."""
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        tiny_backbone("dinov2"), num_labels=3, image_processor=object(), **options
    )
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def randomise(module: nn.Module) -> nn.Module:
    """Move every parameter away from its initial value: norms, biases and layer scales included."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return module


def images(
    batch_size: int = 2, size: int | tuple[int, int] = IMAGE_SIZE, dtype: torch.dtype = torch.float32, seed: int = 7
) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, 3, height, width, generator=generator).to(dtype)


class ScriptedConfig(PreTrainedConfig):
    model_type = "scripted"


class ScriptedBackbone(PreTrainedModel):
    """A backbone whose hidden states are what a function of the images says; `None` returns none at all."""

    config_class = ScriptedConfig
    main_input_name = "pixel_values"

    def __init__(self, hidden_states: Callable[[Tensor], Sequence[Tensor]] | None, **config: object):
        super().__init__(ScriptedConfig(**config))
        self.scale = nn.Parameter(torch.ones(()))
        self.hidden_states = hidden_states

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False, return_dict: bool = True):
        output = ModelOutput(last_hidden_state=pixel_values * self.scale)
        if output_hidden_states and self.hidden_states is not None:
            output["hidden_states"] = tuple(self.hidden_states(pixel_values))
        return output


def patchify(pixel_values: Tensor, patch_size: int | tuple[int, int] = PATCH_SIZE) -> Tensor:
    """`(B, 3, H, W)` to `(B, H * W / p^2, 3 * p^2)`: patch tokens that differ from image to image."""
    return nn.functional.unfold(pixel_values, patch_size, stride=patch_size).transpose(1, 2)
