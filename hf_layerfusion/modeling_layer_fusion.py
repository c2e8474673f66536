"""The model: a frozen backbone, its token bank, and a head that reads all layers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from .backbones import (
    BACKBONE_OPTIONS,
    LOADING_OPTIONS,
    POOLER_PREFIX,
    WeightFingerprint,
    build_backbone,
    execution_device,
    has_adapters,
    open_backbone,
    quantization_of,
)
from .bank import TokenBank
from .checkpoints import (
    BACKBONE_PREFIX,
    hub_options,
    open_config,
    open_pinned_backbone,
    read_head,
    read_summary,
    write_checksums,
)
from .configuration_layer_fusion import ATTENDING_HEADS, HEAD_OPTIONS, LayerFusionConfig
from .errors import LayerFusionError
from .heads import (
    AttendingHead,
    EnsembleHead,
    LinearHead,
    ScalarMixHead,
    TokenStandardizer,
    WidthProjection,
    build_parts,
)
from .hub.cards import write_card
from .hub.push import check_shareable, hub_id, pin_backbone, push_folder
from .hub.safety import tensor_digest
from .images import processed_size, resize_processor
from .losses import classification_loss, scaled_logits
from .noise import Mixture, add_noise_, layer_positions
from .probe import describe_backbone
from .reader import read_bank
from .recipes import find_recipe

if TYPE_CHECKING:
    from .features import LayerFeatures

logger = logging.get_logger(__name__)

PUSH_OPTIONS = ("commit_message", "private", "token", "revision", "create_pr", "backbone_id")


@dataclass
class LayerFusionOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: scalar, when labels were given.
        logits: `(B, C)`.
        layer_attentions: `(B, num_queries, num_heads, N)`, the weight of each token, when asked for; of an ensemble the
            mean over its members.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    layer_attentions: Tensor | None = None


class ViTForAttentiveLayerFusionClassification(PreTrainedModel):
    """A vision backbone with a classification head over the activations of all its layers (arXiv 2601.09322).

    The backbone is frozen and in eval mode, whatever `train()` says, unless the config has `freeze_backbone=False`.
    Checkpoints hold the head only, and name the backbone they belong to.

    Args:
        config: a [`LayerFusionConfig`].
        with_backbone: build the backbone from its config with random weights. `from_backbone` and `from_pretrained`
            attach a trained one instead.
    """

    config_class = LayerFusionConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012 (transformers' own convention)
    # The backbone decides which attention it supports.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    supports_gradient_checkpointing = True
    # `Trainer` would otherwise multiply the loss for a forward that ignores `num_items_in_batch`.
    accepts_loss_kwargs = False
    # `from_pretrained` reads the head and the backbone of a bundle apart, each in its own dtype.
    _keys_to_ignore_on_load_unexpected = [r"^backbone\."]  # noqa: RUF012

    config: LayerFusionConfig

    def __init__(self, config: LayerFusionConfig, with_backbone: bool = True):
        super().__init__(config)
        self.backbone: Any = None
        self.image_processor: Any | None = None
        self.training_summary: dict[str, Any] = {}
        self._loaded_summary: dict[str, Any] | None = None
        self._loaded_digest = ""
        self._frozen_names: set[str] = set()
        self._pooler_names: set[str] = set()
        if with_backbone:
            self.backbone = build_backbone(config.backbone_config)
        parts = build_parts(config)
        self.head = parts["head"]
        self.token_projection = parts.get("token_projection", nn.Identity())
        self.token_standardizer = parts.get("token_standardizer", nn.Identity())
        self.post_init()
        if self.backbone is not None:
            self.attach(self.backbone)

    def _init_weights(self, module: nn.Module) -> None:
        heads = AttendingHead | EnsembleHead | LinearHead | ScalarMixHead
        if isinstance(module, heads | TokenStandardizer | WidthProjection):
            module.reset_parameters()

    # ---- construction ------------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedModel,
        *,
        recipe: str = "alf",
        num_labels: int | None = None,
        id2label: dict[int, str] | Sequence[str] | None = None,
        revision: str | None = None,
        image_processor: Any | None = None,
        num_prefix_tokens: int | None = None,
        grid_size: Sequence[int] | None = None,
        **overrides: Any,
    ) -> ViTForAttentiveLayerFusionClassification:
        """Put a new head on a trained backbone.

        Args:
            backbone: Hub id, folder, or a model in memory; of an image-text model, its vision tower.
            recipe: a name from `RECIPES`, or of a family (`"linear-layer:7"`, see `find_recipe`).
            num_labels: number of classes; taken from `id2label` if that is given.
            id2label: class names, as a dict or a sequence.
            revision: branch, tag or commit on the Hub; the commit is pinned in the config.
            image_processor: kept with the head; by default the one stored beside the backbone.
            num_prefix_tokens: tokens before the patches (CLS, registers), for a backbone whose layout cannot be
                measured.
            grid_size: height and width of the patch grid, likewise.
            overrides: fields of [`LayerFusionConfig`] (with `image_size`, a number of pixels, the image processor is
                changed to give pictures of that size), and `dtype`, `device_map`, `attn_implementation`, `token`, ...
                for loading the backbone.

        Returns:
            The model, with a random head in float32.

        Raises:
            LayerFusionError: for an unknown option, a bad value, or a backbone that cannot be read.
        """
        loading = {key: overrides.pop(key) for key in BACKBONE_OPTIONS if key in overrides}
        if unknown := sorted(overrides.keys() - set(HEAD_OPTIONS)):
            raise LayerFusionError(
                f"{unknown[0]!r} is no option of from_backbone; choose from {', '.join(HEAD_OPTIONS)} for the head, "
                f"and from {', '.join(BACKBONE_OPTIONS)} for the backbone"
            )
        labels = _label_options(num_labels, id2label)
        image_size = overrides.pop("image_size", None)
        # A spelling mistake must not cost the minutes of loading a backbone.
        LayerFusionConfig(recipe=recipe, **labels, **_independent_of_backbone(overrides))
        opened = open_backbone(backbone, revision=revision, image_processor=image_processor, **loading)
        processor = opened.image_processor
        if image_size is not None:
            processor = _resized(processor, image_size, opened.name_or_path)
        elif processor is not None and "tokens" in (overrides.get("pools") or find_recipe(recipe).pools):
            image_size = processed_size(processor)
        # Before the first forward pass, in which some quantisers pack their weights anew.
        fingerprint = WeightFingerprint.of(opened.model)
        layout = describe_backbone(opened.model, num_prefix_tokens=num_prefix_tokens, grid_size=grid_size)
        config = LayerFusionConfig(
            backbone_config=opened.model.config,
            backbone_name_or_path=opened.name_or_path,
            backbone_revision=opened.revision,
            backbone_fingerprint=fingerprint.to_dict(),
            token_layout=layout.to_dict(),
            recipe=recipe,
            image_size=image_size,
            **labels,
            **overrides,
        )
        _check_trainable(opened.model, config.freeze_backbone)
        model = cls(config, with_backbone=False)
        model.attach(opened.model, processor)
        return model.eval()

    def attach(self, backbone: PreTrainedModel, image_processor: Any | None = None) -> None:
        """Take a backbone in, frozen or not, and keep it out of the checkpoints if it is frozen."""
        self.backbone = backbone
        self.image_processor = image_processor or self.image_processor
        if self.config.freeze_backbone:
            backbone.requires_grad_(False)
        self._name_backbone_tensors()
        self._keys_to_ignore_on_save = self._frozen_names if self.config.freeze_backbone else self._pooler_names
        device = execution_device(backbone)
        if device.type != "meta" and self.head_device.type != "meta":
            self.head.to(device)
            self.token_projection.to(device)
            self.token_standardizer.to(device)
        self.train(self.training)

    def _name_backbone_tensors(self) -> None:
        """Exact names, not patterns, are what `save_pretrained` leaves out; merging adapters changes them."""
        names = () if self.backbone is None else self.backbone.state_dict()
        self._frozen_names = {BACKBONE_PREFIX + name for name in names}
        self._pooler_names = {name for name in self._frozen_names if name.startswith(BACKBONE_PREFIX + POOLER_PREFIX)}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `to` and its like do; a backbone that accelerate offloaded or split stays where it was put."""
        if not hasattr(self.backbone, "_hf_hook"):
            return super()._apply(fn, recurse)
        for part in (self.head, self.token_projection, self.token_standardizer):
            part._apply(fn, recurse)
        return self

    @property
    def head_device(self) -> torch.device:
        return next(self.head.parameters()).device

    def train(self, mode: bool = True) -> ViTForAttentiveLayerFusionClassification:
        """Set the head's mode; a frozen backbone stays in eval mode (no dropout, drop path or BatchNorm updates)."""
        super().train(mode)
        if self.backbone is not None and self.config.freeze_backbone:
            self.backbone.eval()
        return self

    def fit_token_statistics(self, features: LayerFeatures) -> None:
        """Take the statistics that `token_normalization="standardize"` needs, of training rows alone.

        `build_trainer` and `sweep` do it where there are none; before training from pixels call it yourself, with features
        that `extract_features` made of the training images.

        Args:
            features: training rows; they may hold more tokens than the head reads.

        Raises:
            LayerFusionError: if the head does not standardise its tokens, or the features have no rows, lack some of the
                tokens or hold values that are not finite.
        """
        if not isinstance(self.token_standardizer, TokenStandardizer):
            raise LayerFusionError(
                f"token_normalization={self.config.token_normalization!r} needs no statistics: leave this call out, or build "
                "the model with token_normalization='standardize'"
            )
        if not len(features):
            raise LayerFusionError("the features hold no row: there is nothing to take statistics of")
        features = features.select_bank(self.config.bank)
        self.token_standardizer.fit(features)
        if not all(torch.isfinite(part).all() for part in (self.token_standardizer.mean, self.token_standardizer.std)):
            self.token_standardizer.reset_parameters()
            features.check()  # says which row
            raise LayerFusionError("the features are too large for statistics in float32: extract them again")

    def load_head_state(self, state: Mapping[str, Tensor]) -> None:
        """Take in what `SweepResult.head_state` gives: the head's tensors, and those of `token_standardizer`, if any."""
        prefix = "token_standardizer."
        self.head.load_state_dict({name: value for name, value in state.items() if not name.startswith(prefix)})
        self.token_standardizer.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        )

    # ---- arithmetic --------------------------------------------------------------------------------------------

    def extract_layer_features(
        self, pixel_values: Tensor, *, bank: TokenBank | None = None, **backbone_kwargs: Any
    ) -> Tensor:
        """Run the backbone and return its tokens as they are cached: pooled, not yet normalised.

        Args:
            pixel_values: `(B, 3, H, W)`.
            bank: another bank than the config's.
            backbone_kwargs: passed to the backbone's forward.

        Returns:
            `(B, N, D)` in the backbone's dtype, without gradient if the backbone is frozen.
        """
        if self.backbone is None:
            raise LayerFusionError("this model holds a head only: load it with from_pretrained(..., backbone=...)")
        with torch.no_grad() if self.config.freeze_backbone else nullcontext():
            return read_bank(
                self.backbone, self.config.layout, bank or self.config.bank, pixel_values, **backbone_kwargs
            )

    def forward(
        self,
        pixel_values: Tensor | None = None,
        layer_features: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        token_statistics: Tensor | None = None,
        **backbone_kwargs: Any,
    ) -> LayerFusionOutput | tuple:
        """Classify images, or tokens that were extracted before.

        Args:
            pixel_values: `(B, 3, H, W)`.
            layer_features: `(B, N, D)` from `extract_layer_features`, instead of `pixel_values`.
            labels: class indices `(B,)`, or floats `(B, C)` for multi-label, or `(B,)` or `(B, C)` for regression.
            output_attentions: also return the weight of each token, `(B, num_queries, num_heads, N)`.
            return_dict: `False` for a tuple.
            token_statistics: `(B, N, 2)`, norm and standard deviation of each of the `layer_features`, as
                `LayerFeatures.with_statistics` gives them; they spare attentive heads one pass over the tokens.
            backbone_kwargs: passed to the backbone's forward.

        Raises:
            LayerFusionError: for both or neither input, tokens of another shape, tokens that are not finite, labels out of
                range, or if tokens are to be standardised and nobody took the statistics.
        """
        if pixel_values is not None and layer_features is None:
            layer_features = self.extract_layer_features(pixel_values, **backbone_kwargs)
        elif layer_features is None or pixel_values is not None:
            raise LayerFusionError("give either pixel_values or layer_features, not both and not neither")
        expected = (len(self.config.bank), self.config.hidden_size)
        if layer_features.ndim != 3 or tuple(layer_features.shape[1:]) != expected:
            raise LayerFusionError(
                f"layer_features has shape {tuple(layer_features.shape)}, but this head reads (batch, {expected[0]}, "
                f"{expected[1]}): {expected[0]} tokens of width {expected[1]}"
            )
        if isinstance(self.token_standardizer, TokenStandardizer) and not self.token_standardizer.is_fitted:
            raise LayerFusionError(
                "token_normalization='standardize', but this head has no statistics of the training rows yet: call "
                "model.fit_token_statistics(features) with features of the training images (build_trainer and sweep do it)"
            )
        mixture = None
        if self.training and labels is not None and self.config.mixup_alpha:
            mixture = Mixture.draw(self.config.mixup_alpha, len(layer_features), self.head_device)
        logits, attentions = self._run_head(layer_features, token_statistics, mixture)
        if logits.device.type == "cpu" and not torch.isfinite(logits).all():
            _refuse_bad_tokens(layer_features, self.config.token_names)
        loss = None if labels is None else self._loss(logits, labels, mixture)
        output = LayerFusionOutput(loss, logits, attentions if output_attentions else None)
        return output.to_tuple() if return_dict is False else output

    def _loss(self, logits: Tensor, labels: Tensor, mixture: Mixture | None) -> Tensor:
        if mixture is None:
            return classification_loss(self.config, logits, labels)
        return mixture.loss(lambda one: classification_loss(self.config, logits, one), labels)

    def _run_head(
        self, layer_features: Tensor, token_statistics: Tensor | None, mixture: Mixture | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and attention weights."""
        outputs, attentions = self._head_outputs(layer_features, token_statistics, mixture)
        return scaled_logits(outputs, self.config.loss), attentions

    def _head_outputs(
        self, layer_features: Tensor, token_statistics: Tensor | None, mixture: Mixture | None
    ) -> tuple[Tensor, Tensor | None]:
        tokens = layer_features.to(self.head_device)
        dtype = next(self.head.parameters()).dtype
        normalize = self.config.token_normalization == "l2"
        is_noisy = self.training and self.config.noise_std > 0
        is_plain = not is_noisy and mixture is None and self.config.token_normalization != "standardize"
        dropout = {"token_keep": keep} if (keep := self._token_keep(tokens)) is not None else {}
        if isinstance(self.head, AttendingHead | EnsembleHead) and is_plain and self.config.width_alignment == "pad":
            if dtype == torch.float64:
                tokens, token_statistics = tokens.double(), None  # which are float32
            elif token_statistics is not None:
                token_statistics = token_statistics.to(self.head_device)
            return self.head(tokens, True, normalize=normalize, token_statistics=token_statistics, **dropout)
        if self.config.token_normalization == "standardize":
            tokens = self.token_standardizer(tokens.to(torch.promote_types(dtype, tokens.dtype)))
        tokens = tokens.to(dtype)
        if normalize:
            tokens = F.normalize(tokens, dim=-1)
        tokens = self.token_projection(tokens)
        if (mixture is not None or is_noisy) and tokens.data_ptr() == layer_features.data_ptr():
            tokens = tokens.clone()  # a caller's tokens are not changed
        if mixture is not None:
            tokens = mixture.mix_(tokens)
        if is_noisy:
            uniform = torch.rand(len(tokens), device=tokens.device)
            tokens = add_noise_(tokens, self.config.noise_std, self.config.noise_probability, uniform)
        if dropout and self.config.head_type not in ATTENDING_HEADS:
            return self.head(tokens * dropout["token_keep"].to(dtype)[..., None], output_attentions=True)
        return self.head(tokens, output_attentions=True, **dropout)

    def _token_keep(self, tokens: Tensor) -> Tensor | None:
        """Dropout of whole layers, `(B, N)`: the same for all tokens of a layer; `None` for none."""
        if not self.training or not self.config.layer_dropout:
            return None
        layers = layer_positions(self.config.bank)
        ones = torch.ones(len(tokens), max(layers) + 1, device=tokens.device)
        return F.dropout(ones, self.config.layer_dropout)[:, layers]

    # ---- files -------------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        include_backbone: bool | None = None,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `config.json`, `model.safetensors`, the image processor and a model card.

        Args:
            save_directory: folder, created if needed.
            include_backbone: write the backbone too. By default only an unfrozen one, which nothing else holds.
            push_to_hub: also push, to `repo_id` or the folder's name.
            kwargs: for `PreTrainedModel.save_pretrained`, and for `push_to_hub` (`private`, `token`, ...).

        Raises:
            LayerFusionError: if a fine-tuned backbone would be lost.
        """
        pushing = {option: kwargs.pop(option) for option in PUSH_OPTIONS if option in kwargs}
        if include_backbone is None:
            include_backbone = not self.config.freeze_backbone
        if not include_backbone and not self.config.freeze_backbone and not has_adapters(self.backbone):
            raise LayerFusionError("this backbone was fine-tuned: saving the head alone would lose it")
        if include_backbone and (method := quantization_of(self.backbone)):
            raise LayerFusionError(
                f"a {method}-quantised backbone cannot be written beside the head: leave include_backbone out, and the "
                "checkpoint names the backbone and how it was quantised"
            )
        self.config.includes_backbone = include_backbone
        self._name_backbone_tensors()
        self._keys_to_ignore_on_save = self._pooler_names if include_backbone else self._frozen_names
        if not self.config.freeze_backbone:
            self.config.backbone_fingerprint = WeightFingerprint.of(self.backbone).to_dict()
        # Names as they are in memory, so that `Trainer` can read its own checkpoints.
        kwargs.setdefault("save_original_format", False)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self._keys_to_ignore_on_save = self._frozen_names if self.config.freeze_backbone else self._pooler_names
        if kwargs.get("is_main_process", True):
            if self.image_processor is not None:
                self.image_processor.save_pretrained(save_directory)
            write_checksums(save_directory)
            write_card(save_directory, self.config, self._valid_summary(), _count_parameters(self.head))
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, include_backbone=include_backbone, **pushing)

    def _head_digest(self) -> str:
        return tensor_digest(
            {
                **self.head.state_dict(),
                **self.token_projection.state_dict(prefix="token_projection."),
                **self.token_standardizer.state_dict(prefix="token_standardizer."),
            }
        )

    def _valid_summary(self) -> dict[str, Any]:
        """What was measured of this head: not what was read beside a head that was trained further since."""
        is_loaded = bool(self._loaded_summary) and self.training_summary is self._loaded_summary
        if is_loaded and self._head_digest() != self._loaded_digest:
            logger.warning("the head changed since it was loaded: its old training record is left out")
            return {}
        return self.training_summary

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        include_backbone: bool | None = None,
        backbone_id: str | None = None,
        commit_message: str = "Upload head",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> str:
        """Upload what `save_pretrained` writes, in one commit.

        Args:
            repo_id: `user/name`, or `name` for one's own.
            include_backbone: as for `save_pretrained`.
            backbone_id: the Hub id under which others find a backbone that was opened from a folder. Its current commit
                is pinned; whoever loads the head has the weights compared with this backbone's fingerprint.
            commit_message: title of the commit.
            private: of a new repository.
            token: of a user who may write; by default the one that is logged in.
            revision: branch, created if it is missing.
            create_pr: open a pull request instead.
            kwargs: for `save_pretrained`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            LayerFusionError: if the backbone is in a folder of this machine and no Hub id is named for it, without a
                token or the right to write, or if the upload fails. The repository then holds all of it or nothing.
        """
        bundled = not self.config.freeze_backbone if include_backbone is None else include_backbone
        with self._named_for_others(backbone_id, bundled, token), tempfile.TemporaryDirectory() as folder:

            def write(repo: str) -> Path:
                summary, self.training_summary = self.training_summary, {**self._valid_summary(), "repo_id": repo}
                try:
                    self.save_pretrained(folder, include_backbone=include_backbone, **kwargs)
                finally:
                    self.training_summary = summary
                return Path(folder)

            commit = push_folder(
                repo_id,
                write,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )
        return commit.pr_url or commit.commit_url

    @contextmanager
    def _named_for_others(self, backbone_id: str | None, bundled: bool, token: str | bool | None) -> Iterator[None]:
        """Name the backbone as others find it, with a commit, while the head is written for them; never by a folder."""
        config, nested = self.config, self.config.backbone_config
        here = config.backbone_name_or_path, config.backbone_revision, nested._name_or_path
        name, revision, _ = here
        if bundled:
            name, revision = (name, revision) if hub_id(name) else (None, None)
        else:
            if backbone_id is None:
                check_shareable(config)
            if backbone_id is not None or revision is None:
                name = backbone_id or str(name)
                revision = pin_backbone(name, token)
        config.backbone_name_or_path, config.backbone_revision, nested._name_or_path = name, revision, name or ""
        try:
            yield
        finally:
            config.backbone_name_or_path, config.backbone_revision, nested._name_or_path = here

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        backbone: str | Path | PreTrainedModel | None = None,
        verify_backbone: bool = True,
        config: LayerFusionConfig | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a head and the backbone it was trained on.

        Args:
            pretrained_model_name_or_path: Hub id or folder of the head.
            backbone: use this one (a model in memory, a folder or a Hub id) instead of fetching the pinned one.
            verify_backbone: `False` turns a mismatch of the backbone's weights from an error into a warning.
            kwargs: for `PreTrainedModel.from_pretrained`; `dtype`, `device_map`, `token` and the like reach the
                backbone too.

        Returns:
            The model in eval mode; with `output_loading_info` also transformers' loading report.

        Raises:
            LayerFusionError: if the head's tensors do not match its config, or the backbone is not the one the head
                was trained on.
        """
        name = str(pretrained_model_name_or_path)
        hub_kwargs = hub_options(kwargs)
        if not isinstance(config, LayerFusionConfig):
            config = open_config(name if config is None else str(config), hub_kwargs)
        model, info = cls.load_head(name, *model_args, config=config, **kwargs)
        opened = open_pinned_backbone(name, config, backbone, verify_backbone, kwargs)
        model.attach(opened.model, model.image_processor or opened.image_processor)
        return (model, info) if output_loading_info else model

    @classmethod
    def load_head(
        cls, name: str, *model_args: Any, config: LayerFusionConfig, **kwargs: Any
    ) -> tuple[ViTForAttentiveLayerFusionClassification, dict[str, Any]]:
        """A checked head without its backbone, its image processor, and transformers' loading report."""
        tensors, image_processor = read_head(name, config, hub_options(kwargs))
        # Where the backbone is put and how it computes says nothing about the head, which is small.
        for_head = {key: value for key, value in kwargs.items() if key == "dtype" or key not in LOADING_OPTIONS}
        # Given tensors and no name, transformers looks for no other files: no adapters, shards or generation settings.
        loaded: Any = super().from_pretrained(
            None,
            *model_args,
            config=config,
            state_dict=tensors,
            with_backbone=False,
            output_loading_info=True,
            **for_head,
        )
        model, info = loaded
        model.name_or_path = model.config.name_or_path = name
        model.image_processor = image_processor
        model._loaded_summary = model.training_summary = read_summary(name, hub_options(kwargs))
        model._loaded_digest = model._head_digest()
        return model, info


def _label_options(num_labels: int | None, id2label: dict[int, str] | Sequence[str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    if id2label is not None:
        names = dict(id2label) if isinstance(id2label, dict) else dict(enumerate(id2label))
        options |= {"id2label": names, "label2id": {label: index for index, label in names.items()}}
    return options


def _resized(processor: Any, image_size: Any, name: str | None) -> Any:
    if type(image_size) is not int or image_size < 1:
        raise LayerFusionError(f"image_size={image_size!r}: give a number of pixels, for height and width")
    if processor is None:
        raise LayerFusionError(f"{name} has no image processor whose image_size could be set: pass image_processor=")
    return resize_processor(processor, image_size)


def _independent_of_backbone(overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides that can be checked before the backbone's depth, width and tokens are known."""
    dependent = {"layers", "modules", "pools", "num_heads"}
    if overrides.get("head_type") == "two_stage":  # it needs patches or cells among the pools
        dependent |= {"head_type", "stage_queries"}
    return {key: value for key, value in overrides.items() if key not in dependent}


def _check_trainable(backbone: PreTrainedModel, frozen: bool) -> None:
    """Refuse to fine-tune what cannot learn."""
    if frozen:
        return
    method = quantization_of(backbone)
    if method is not None and not has_adapters(backbone):
        raise LayerFusionError(
            f"freeze_backbone=False: {method}-quantised weights cannot be trained; attach adapters to them (PEFT), or "
            "load the backbone without quantization_config"
        )
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise LayerFusionError(
            "freeze_backbone=False, but no parameter of this backbone requires a gradient: call requires_grad_(True) on "
            "it, or load its adapters with is_trainable=True"
        )


def _refuse_bad_tokens(layer_features: Tensor, token_names: Sequence[str]) -> None:
    finite = torch.isfinite(layer_features).all(dim=-1)
    if not finite.all():
        row, token = torch.nonzero(~finite)[0].tolist()
        raise LayerFusionError(
            f"layer_features holds NaN or infinite values: row {row} of the batch, {token_names[token]}; "
            "extract the features again in float32 or bfloat16"
        )


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
