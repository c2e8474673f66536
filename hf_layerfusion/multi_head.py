"""Many heads on one backbone that reads each image once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .bank import TokenBank
from .checkpoints import hub_options, open_config, open_pinned_backbone
from .errors import LayerFusionError
from .features.manifest import describe_difference, plain_values
from .modeling_layer_fusion import LayerFusionOutput, ViTForAttentiveLayerFusionClassification
from .reader import read_bank


class LayerFusionHeads(Mapping[str, ViTForAttentiveLayerFusionClassification]):
    """Heads by name, around one backbone; made by [`load_heads`].

    `heads["user/flowers"]` is a whole model, which shares the backbone with the others. All have the same image
    processor, `heads.image_processor`.
    """

    def __init__(self, models: Mapping[str, ViTForAttentiveLayerFusionClassification]):
        self._models = dict(models)
        first = next(iter(self._models.values()))
        self.backbone: PreTrainedModel = first.backbone
        self.image_processor = first.image_processor
        self._layout = first.config.layout
        self._bank = first.config.bank
        for model in self._models.values():
            self._bank = self._bank | model.config.bank
        self._positions = {name: self._bank.positions_of(model.config.bank) for name, model in self._models.items()}

    def __getitem__(self, name: str) -> ViTForAttentiveLayerFusionClassification:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def bank(self) -> TokenBank:
        """The tokens that the backbone is read for: those of all heads, each once."""
        return self._bank

    def to(self, *args: Any, **kwargs: Any) -> LayerFusionHeads:
        """Move the backbone and all heads, as `torch.nn.Module.to` does."""
        for model in self._models.values():
            model.to(*args, **kwargs)
        return self

    def __call__(
        self, pixel_values: Tensor, output_attentions: bool | None = None, **backbone_kwargs: Any
    ) -> dict[str, LayerFusionOutput]:
        """Classify images by every head, in one pass of the backbone.

        Args:
            pixel_values: `(B, 3, H, W)`.
            output_attentions: also return the weight of each head's tokens.
            backbone_kwargs: passed to the backbone's forward.

        Returns:
            The output of each head, by name, as its own model gives it.
        """
        with torch.no_grad():
            tokens = read_bank(self.backbone, self._layout, self._bank, pixel_values, **backbone_kwargs)
        outputs = {}
        for name, model in self._models.items():
            positions = self._positions[name]
            own = tokens if positions == list(range(tokens.shape[1])) else tokens[:, positions]
            # Tokens are padded to the widest of all heads' tokens.
            own = own[..., : model.config.hidden_size]
            outputs[name] = model(layer_features=own, output_attentions=output_attentions)
        return outputs


def load_heads(
    backbone: str | Path | PreTrainedModel | None,
    names: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    verify_backbone: bool = True,
    **kwargs: Any,
) -> LayerFusionHeads:
    """Load heads that were trained on one backbone, and that backbone once.

    Args:
        backbone: a model in memory, a folder or a Hub id; `None` for the one that the first head names.
        names: Hub ids or folders of heads, or a mapping from names of one's own to them.
        verify_backbone: `False` turns a mismatch of the backbone's weights from an error into a warning.
        kwargs: for `from_pretrained` (`revision`, `token`, `dtype`, `device_map`, ...).

    Raises:
        LayerFusionError: if a head cannot be read, was trained on another backbone, reads its tokens otherwise, or
            wants other images than the first.
    """
    wanted = {name: str(path) for name, path in names.items()} if isinstance(names, Mapping) else _by_name(names)
    if not wanted:
        raise LayerFusionError("load_heads needs at least one head")
    hub_kwargs = hub_options(kwargs)
    configs = {name: open_config(path, hub_kwargs) for name, path in wanted.items()}
    first = next(iter(configs))
    others = {wanted[name]: config for name, config in configs.items() if name != first}
    opened = open_pinned_backbone(wanted[first], configs[first], backbone, verify_backbone, kwargs, others)
    models: dict[str, ViTForAttentiveLayerFusionClassification] = {}
    for name, path in wanted.items():
        config = configs[name]
        if config.token_layout != configs[first].token_layout:
            raise LayerFusionError(
                f"head {path} counts the backbone's tokens otherwise than {wanted[first]}: load it by itself"
            )
        model, _ = ViTForAttentiveLayerFusionClassification.load_head(path, config=config, **kwargs)
        model.attach(opened.model, model.image_processor or opened.image_processor)
        models[name] = model
        _check_same_images(models[first], model, wanted[first], path)
    return LayerFusionHeads(models)


def _by_name(names: Sequence[str | Path]) -> dict[str, str]:
    if isinstance(names, str | Path):
        raise LayerFusionError(f"names={str(names)!r} is one name: give a list of heads")
    by_name = {str(name): str(name) for name in names}
    if len(by_name) != len(names):
        raise LayerFusionError("load_heads was given a head twice")
    return by_name


def _check_same_images(
    one: ViTForAttentiveLayerFusionClassification,
    other: ViTForAttentiveLayerFusionClassification,
    name: str,
    other_name: str,
) -> None:
    """Refuse heads that would need the same picture prepared in two ways: one pass cannot serve both."""
    processors = [model.image_processor for model in (one, other)]
    if None in processors:
        return
    settings = [plain_values(processor.to_dict()) for processor in processors if processor is not None]
    if difference := describe_difference(*settings):
        raise LayerFusionError(
            f"heads {name} and {other_name} want images prepared differently ({difference}): load them apart"
        )
