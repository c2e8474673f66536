"""Backbones that are loaded in special ways: half precision, attention, quantised, offloaded, PEFT, timm.

Every option runs on tiny models here; `docs/backbones.md` says what it means for real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import peft
import pytest
import torch
from modeling_helpers import images, tiny_backbone
from PIL import Image
from safetensors import safe_open
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModel,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import is_flash_attn_2_available

from hf_layerfusion import LayerFusionError, ViTForAttentiveLayerFusionClassification, extract_features
from hf_layerfusion.backbones import WeightFingerprint

MODEL_TYPES = ("vit", "dinov2", "clip_vision_model", "siglip_vision_model")
LABELS = torch.tensor([0, 1])

build = ViTForAttentiveLayerFusionClassification.from_backbone
load = ViTForAttentiveLayerFusionClassification.from_pretrained


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved backbone per model type."""
    root = tmp_path_factory.mktemp("backbones")
    for model_type in MODEL_TYPES:
        backbone = tiny_backbone(model_type)
        if model_type == "vit":
            backbone.pooler = None  # as on the Hub, where few checkpoints have one
        backbone.save_pretrained(root / model_type)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / model_type)
    return {model_type: str(root / model_type) for model_type in MODEL_TYPES}


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    pixels = [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(3)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    return datasets.Dataset.from_dict({"image": pixels, "label": [0, 1, 2]}, features=features)


def open_vit(folder, **options):
    return AutoModel.from_pretrained(folder, add_pooling_layer=False, **options)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def tensor_names(head):
    with safe_open(Path(head, "model.safetensors"), framework="pt") as file:
        return list(file.keys())


@torch.no_grad()
def logits(model):
    return model.eval()(images()).logits


def assert_trains_its_head_only(model):
    """One backward pass reaches every parameter of the head, and none of the backbone."""
    model.train()
    model(images(), labels=LABELS).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.head.parameters())
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


# ---- precision and attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "float16"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_half_backbone_under_a_float_head(folders, tmp_path, model_type, dtype):
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = build(folders[model_type], num_labels=3, dtype=dtype)
    assert {parameter.dtype for parameter in model.backbone.parameters()} == {expected}
    assert {parameter.dtype for parameter in model.head.parameters()} == {torch.float32}
    assert model.config.backbone_fingerprint["dtype"] == str(expected).removeprefix("torch.")
    assert model.extract_layer_features(images()).dtype == expected
    assert model(images(), labels=LABELS).loss.dtype == torch.float32
    assert_trains_its_head_only(model)
    again = load(saved(model, tmp_path / "head"))
    assert (again.backbone.dtype, next(again.head.parameters()).dtype) == (expected, torch.float32)
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_attention_implementations_agree(folders, tmp_path, model_type):
    tokens = {}
    for name in ("sdpa", "eager"):
        model = build(folders[model_type], num_labels=3, attn_implementation=name)
        assert model.backbone.config._attn_implementation == name
        assert model.config.backbone_config._attn_implementation == name
        tokens[name] = model.extract_layer_features(images())
    torch.testing.assert_close(tokens["sdpa"], tokens["eager"], rtol=1e-4, atol=1e-4)
    again = load(saved(model, tmp_path / "head"), attn_implementation="eager")
    assert again.backbone.config._attn_implementation == "eager"


@pytest.mark.skipif(is_flash_attn_2_available(), reason="it is about machines without flash attention")
def test_missing_flash_attention_is_named(folders, tmp_path):
    message = "attn_implementation='flash_attention_2'.*FlashAttention2.*install"
    with pytest.raises(LayerFusionError, match=message):
        build(folders["vit"], attn_implementation="flash_attention_2", dtype="bfloat16")
    head = saved(build(folders["vit"], num_labels=3), tmp_path / "head")
    with pytest.raises(LayerFusionError, match=message):
        load(head, attn_implementation="flash_attention_2")


def test_unknown_options_are_named(folders):
    with pytest.raises(LayerFusionError, match=r"attn_implementation='fast'.*sdpa"):
        build(folders["vit"], attn_implementation="fast")
    with pytest.raises(LayerFusionError, match=r"device_map='nowhere'"):
        build(folders["vit"], device_map="nowhere")


# ---- quantised ------------------------------------------------------------------------------------------------------


def int8():
    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def quantised_folder(folders, tmp_path_factory):
    """A backbone whose file holds int8 weights already."""
    folder = tmp_path_factory.mktemp("quantised")
    open_vit(folders["vit"], quantization_config=int8()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_quantised_backbone(folders, tmp_path, model_type, caplog):
    model = build(folders[model_type], num_labels=3, quantization_config=int8())
    kinds = {type(parameter).__name__ for parameter in model.backbone.parameters()}
    assert kinds == {"Int8Tensor", "Parameter"}
    assert model.config.backbone_fingerprint["quantization"] == "torchao"
    assert_trains_its_head_only(model)
    exact = build(folders[model_type], num_labels=3).extract_layer_features(images())
    error = (model.extract_layer_features(images()) - exact).norm() / exact.norm()
    assert 0 < error < 0.05  # int8 steps are 1/254 of a row's range
    again = load(saved(model, tmp_path / "head"))
    assert {type(parameter).__name__ for parameter in again.backbone.parameters()} == kinds
    assert {type(parameter).__name__ for parameter in again.head.parameters()} == {"Parameter"}
    torch.testing.assert_close(logits(again), logits(model))
    assert not caplog.records


def test_backbone_that_was_saved_quantised(quantised_folder, tmp_path):
    model = build(quantised_folder, num_labels=3)
    again = load(saved(model, tmp_path / "head"))
    assert again.backbone.config.quantization_config is not None
    torch.testing.assert_close(logits(again), logits(model))


def test_quantised_weights_are_recognised(folders, tmp_path):
    quantised = open_vit(folders["vit"], quantization_config=int8())
    head = saved(build(quantised, num_labels=3), tmp_path / "head")
    load(head, backbone=open_vit(folders["vit"], quantization_config=int8()))
    other = open_vit(folders["vit"])
    with torch.no_grad():
        other.layers[1].mlp.fc1.weight[0, 0] += 1.0
    other.save_pretrained(tmp_path / "other")
    other = open_vit(tmp_path / "other", quantization_config=int8())
    with pytest.raises(LayerFusionError, match=r"1 of \d+ parts have other weights \(layers.1\)"):
        load(head, backbone=other)


def test_other_quantisation_is_a_warning(folders, tmp_path, caplog):
    head = saved(build(folders["vit"], num_labels=3), tmp_path / "head")
    loaded = load(head, quantization_config=int8())
    (record,) = caplog.records
    assert "trained on a float32 backbone and is given a float32 torchao-quantised one" in record.message
    assert "Int8Tensor" in {type(parameter).__name__ for parameter in loaded.backbone.parameters()}


def test_what_quantised_backbones_cannot_do(folders, tmp_path):
    with pytest.raises(LayerFusionError, match="torchao-quantised weights cannot be trained"):
        build(folders["vit"], num_labels=3, quantization_config=int8(), freeze_backbone=False)
    model = build(folders["vit"], num_labels=3, quantization_config=int8())
    with pytest.raises(LayerFusionError, match="torchao-quantised backbone cannot be written beside the head"):
        model.save_pretrained(tmp_path / "bundle", include_backbone=True)
    with pytest.raises(LayerFusionError, match="torchao-quantised backbone keeps its dtype"):
        load(saved(model, tmp_path / "head"), dtype="bfloat16")


# ---- device_map and offloading --------------------------------------------------------------------------------------


def split(first, rest):
    """A device map of the tiny ViT: embeddings and first block here, the others there."""
    return {"embeddings": first, "layers.0": first, "layers.1": rest, "layers.2": rest, "layernorm": rest}


@pytest.mark.parametrize(
    "device_map",
    ["auto", {"": "cpu"}, split("cpu", "disk"), split("disk", "cpu")],
    ids=["auto", "cpu", "disk-behind", "disk-in-front"],
)
def test_device_map(folders, tmp_path, pictures, device_map):
    plain = build(folders["vit"], num_labels=3)
    model = build(folders["vit"], num_labels=3, device_map=device_map)
    is_offloaded = "disk" in str(device_map)
    assert any(parameter.is_meta for parameter in model.backbone.parameters()) == is_offloaded
    assert not any(parameter.is_meta for parameter in model.head.parameters())
    assert model.config.backbone_fingerprint == plain.config.backbone_fingerprint
    assert torch.equal(model.extract_layer_features(images()), plain.extract_layer_features(images()))
    assert_trains_its_head_only(model)
    again = load(saved(model, tmp_path / "head"), device_map=device_map)
    assert any(parameter.is_meta for parameter in again.backbone.parameters()) == is_offloaded
    torch.testing.assert_close(logits(again), logits(model))
    torch.testing.assert_close(logits(load(tmp_path / "head")), logits(model))
    features = extract_features(model, pictures, tmp_path / "features", dtype="float32", progress=False)
    expected = extract_features(plain, pictures, tmp_path / "expected", dtype="float32", progress=False)
    (batch,), (wanted,) = (list(cache.batches(3)) for cache in (features, expected))
    assert torch.equal(torch.as_tensor(batch["layer_features"]), torch.as_tensor(wanted["layer_features"]))


def test_offloaded_instance_and_its_fingerprint(folders):
    offloaded = open_vit(folders["vit"], device_map=split("disk", "cpu"))
    plain = open_vit(folders["vit"])
    assert WeightFingerprint.of(offloaded) == WeightFingerprint.of(plain)
    tokens = build(offloaded, num_labels=3).extract_layer_features(images())
    assert torch.equal(tokens, build(plain, num_labels=3).extract_layer_features(images()))


@pytest.mark.parametrize("option", ["quantised", "offloaded"])
def test_training_and_resuming(folders, tmp_path, option):
    """`Trainer` moves the model to its device, saves it, and goes on from its checkpoint."""
    options = {
        "quantised": {"quantization_config": int8()},
        "offloaded": {"device_map": split("disk", "cpu")},
    }[option]
    model = build(folders["vit"], num_labels=3, **options)
    rows = [{"pixel_values": pixels, "labels": index % 3} for index, pixels in enumerate(images(batch_size=4))]
    settings = {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
    for steps in (2, 3):
        arguments = TrainingArguments(tmp_path, max_steps=steps, save_steps=1, **settings)
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=steps > 2)
    assert trainer.state.global_step == 3
    assert not any("backbone" in name for name in tensor_names(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(logits(load(tmp_path / "checkpoint-3")), logits(model))


# ---- PEFT -----------------------------------------------------------------------------------------------------------


def lora(**options):
    # Random adapters: PEFT's default ones change nothing before they are trained.
    return peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False, **options)


@pytest.fixture
def adapted(folders):
    """A PEFT model around a tiny ViT."""
    return peft.get_peft_model(open_vit(folders["vit"]), lora())


def hidden_states(model):
    with torch.no_grad():
        return model.eval()(images(), output_hidden_states=True).hidden_states


def assert_reads(model, backbone):
    """The bank's CLS tokens are those of the backbone that was handed in, adapters and all."""
    tokens = model.eval().extract_layer_features(images(), bank=model.config.bank)
    expected = torch.stack([state[:, 0] for state in hidden_states(backbone)[1:]], dim=1)
    torch.testing.assert_close(tokens[:, ::2], expected)


@pytest.mark.parametrize("how", ["peft_model", "base_model", "add_adapter", "mixed"])
def test_adapters_are_read(folders, tmp_path, how):
    plain = open_vit(folders["vit"])
    if how == "add_adapter":
        plain.add_adapter(lora())
        given = backbone = plain
    else:
        given = peft.get_peft_model(plain, lora(), mixed=how == "mixed")
        backbone = plain
        given = backbone if how == "base_model" else given
    model = build(given, num_labels=3)
    assert_reads(model, backbone)
    assert (hidden_states(backbone)[-1] - hidden_states(open_vit(folders["vit"]))[-1]).abs().max() > 0.1
    assert_trains_its_head_only(model)
    # The base's name alone does not bring these weights back.
    assert model.config.backbone_name_or_path is None
    head = saved(model, tmp_path / "head")
    assert not any("backbone" in name for name in tensor_names(head))
    with pytest.raises(LayerFusionError, match="pass it as backbone="):
        load(head)
    with pytest.raises(LayerFusionError, match="other weights"):
        load(head, backbone=folders["vit"])
    torch.testing.assert_close(logits(load(head, backbone=given)), logits(model))


def test_adapters_around_a_classifier(tmp_path):
    """LoRA on a whole classifier: its backbone is taken, adapters stay, and its name is not that of a plain model."""
    torch.manual_seed(3)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    config.image_size, config.patch_size = 32, 8
    ViTForImageClassification(config).save_pretrained(tmp_path / "classifier")
    classifier = ViTForImageClassification.from_pretrained(tmp_path / "classifier")
    model = build(peft.get_peft_model(classifier, lora(modules_to_save=["classifier"])), num_labels=3)
    assert model.backbone is classifier.vit
    assert model.config.backbone_name_or_path is None
    assert_reads(model, classifier.vit)


@pytest.mark.parametrize("with_base", [False, True], ids=["adapter-only", "beside-its-base"])
def test_folder_of_an_adapter(adapted, folders, tmp_path, with_base):
    """An `adapter_config.json` redirects transformers to PEFT: the adapter on its base, by name and back again."""
    adapted.save_pretrained(tmp_path / "adapter")
    if with_base:
        open_vit(folders["vit"]).save_pretrained(tmp_path / "adapter")
    model = build(tmp_path / "adapter", num_labels=3)
    assert_reads(model, adapted.get_base_model())
    assert model.config.backbone_name_or_path == str(tmp_path / "adapter")
    again = load(saved(model, tmp_path / "head"))
    torch.testing.assert_close(logits(again), logits(model))


def test_only_adapters_are_fine_tuned(adapted, tmp_path):
    model = build(adapted, num_labels=3, freeze_backbone=False).train()
    model(images(), labels=LABELS).loss.backward()
    trained = {name for name, parameter in model.backbone.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    # The way back: the adapters by themselves, and the head, which knows their new fingerprint.
    adapted.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "head", include_backbone=False)
    again = load(tmp_path / "head", backbone=tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model))


def test_merged_adapters_are_plain_weights(adapted, tmp_path):
    model = build(adapted, num_labels=3, freeze_backbone=False)
    before = logits(model)
    adapted.merge_and_unload()
    again = load(saved(model, tmp_path / "head"))
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-5)


def test_merging_later_adds_nothing_to_the_checkpoint(adapted, tmp_path):
    model = build(adapted, num_labels=3)
    adapted.merge_and_unload()
    assert not any("backbone" in name for name in tensor_names(saved(model, tmp_path / "head")))


def test_bundled_adapters_are_refused_with_the_cure(adapted, tmp_path):
    build(adapted, num_labels=3).save_pretrained(tmp_path / "head", include_backbone=True)
    with pytest.raises(LayerFusionError, match="merge"):
        load(tmp_path / "head")


def test_nothing_to_fine_tune(adapted, folders, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter")
    frozen = peft.PeftModel.from_pretrained(open_vit(folders["vit"]), tmp_path / "adapter")
    with pytest.raises(
        LayerFusionError, match=r"no parameter of this backbone requires a gradient.*is_trainable=True"
    ):
        build(frozen, num_labels=3, freeze_backbone=False)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (torch.nn.Linear(2, 2), "backbone is a Linear: give a Hub id, a folder, a transformers model or a PEFT model"),
        (None, "backbone is a NoneType"),
        (SimpleNamespace(peft_config={"a": peft.PromptTuningConfig(num_virtual_tokens=2)}), "prompt learning"),
    ],
    ids=["module", "none", "prompt-tuning"],
)
def test_what_is_no_backbone(backbone, message):
    with pytest.raises(LayerFusionError, match=message):
        build(backbone)


# ---- timm -----------------------------------------------------------------------------------------------------------
# timm needs torchvision, whose wheels load beside one build of torch only. Both stand in a folder of their own, and
# these tests run in a process of their own, so that the other tests see neither.

TIMM_FOLDER = Path(os.environ.get("LAYERFUSION_TIMM", Path(sys.prefix) / "timm"))
IN_CHILD = os.environ.get("LAYERFUSION_TIMM_CHILD") == "1"

# torchvision's Python part wants its compiled operators to exist; none of them is called here.
_SITE = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def test_timm_without_timm(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "timm_wrapper", "architecture": "resnet18"}))
    with pytest.raises(LayerFusionError, match="timm"):
        build(tmp_path)


def test_timm_backbones(tmp_path):
    """Runs the tests below where timm can be imported."""
    if not (TIMM_FOLDER / "timm").is_dir():
        pytest.fail(f"no timm in {TIMM_FOLDER}: run `make setup`")
    (tmp_path / "sitecustomize.py").write_text(_SITE)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(TIMM_FOLDER), os.environ.get("PYTHONPATH", "")]),
        "LAYERFUSION_TIMM_CHILD": "1",
    }
    command = [sys.executable, "-m", "pytest", __file__, "-k", "test_in_child", "-p", "no:cacheprovider"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
    assert f"{len(TIMM_MODELS) + 4} passed" in child.stdout


# Architecture, arguments that make it small, and what its layers are: prefix tokens of a ViT, `None` for maps.
TIMM_MODELS = {
    "vit": ("vit_tiny_patch16_224", {"depth": 2, "img_size": 64}, 1),
    "registers": ("vit_small_patch14_reg4_dinov2", {"depth": 2, "img_size": 56}, 5),
    "dinov3": ("vit_small_patch16_dinov3", {"depth": 2, "img_size": 64}, 5),
    "siglip": ("vit_base_patch16_siglip_224", {"depth": 2, "img_size": 64, "embed_dim": 192}, 0),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", {"depth": 2, "img_size": 64}, 2),
    "beit": ("beit_base_patch16_224", {"depth": 2, "img_size": 64, "embed_dim": 192}, 1),
    "eva02": ("eva02_tiny_patch14_224", {"depth": 2, "img_size": 56}, 1),
    "convnext": ("convnext_atto", {}, None),
    "resnet": ("resnet18", {}, None),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 48}, None),
    "efficientnet": ("efficientnet_b0", {}, None),
}

if IN_CHILD:
    import timm
    from modeling_helpers import randomise
    from safetensors.torch import save_file
    from transformers import TimmWrapperConfig

    def timm_backbone(name):
        architecture, arguments, _ = TIMM_MODELS[name]
        config = TimmWrapperConfig(architecture=architecture, model_args=arguments or None)
        return randomise(AutoModel.from_config(config)).eval()

    def timm_images(model):
        height, width = model.config.layout.image_size
        return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(7))

    @pytest.mark.parametrize("name", TIMM_MODELS)
    def test_in_child_layers(name, tmp_path):
        """Every layer's tokens are timm's own intermediate features, prefix tokens apart."""
        num_prefix = TIMM_MODELS[name][2]
        backbone = timm_backbone(name)
        model = build(backbone, num_labels=3)
        pixels = timm_images(model)
        tokens = model.extract_layer_features(pixels)
        has_cls = bool(num_prefix) and name != "siglip"
        pools = ["cls", "mean"] if has_cls else ["mean"]
        assert model.config.pools == pools
        with torch.no_grad():
            if num_prefix is None:
                _, maps = backbone.timm_model.forward_intermediates(pixels)
                expected = [[feature_map.mean(dim=(2, 3))] for feature_map in maps]
            else:
                assert set(model.config.layout.num_prefix_tokens) == {num_prefix}
                _, states = backbone.timm_model.forward_intermediates(
                    pixels, return_prefix_tokens=True, output_fmt="NLC"
                )
                states = [state if isinstance(state, tuple) else (state, None) for state in states]
                expected = [
                    [prefix[:, 0], patches.mean(dim=1)] if has_cls else [patches.mean(dim=1)]
                    for patches, prefix in states
                ]
        assert model.config.num_backbone_layers == len(expected)
        for index, wanted in enumerate(vector for layer in expected for vector in layer):
            width = wanted.shape[1]
            torch.testing.assert_close(tokens[:, index, :width], wanted, rtol=1e-4, atol=1e-4)
            assert not tokens[:, index, width:].any()
        backbone.save_pretrained(tmp_path / "backbone")
        model = build(tmp_path / "backbone", num_labels=3, dtype=torch.bfloat16)
        again = load(saved(model, tmp_path / "head"))
        with torch.no_grad():
            torch.testing.assert_close(again(pixels).logits, model(pixels).logits)

    def test_in_child_repository_of_timm(tmp_path, pictures):
        """A repository as timm writes it: its own config.json, weights without prefix, the processor in the config."""
        folder = tmp_path / "timm"
        folder.mkdir()
        model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=5)
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
        )
        pretrained = {"input_size": [3, 64, 64], "interpolation": "bicubic", "crop_pct": 1.0, "num_classes": 5}
        pretrained |= {"mean": [0.5] * 3, "std": [0.5] * 3, "first_conv": "patch_embed.proj", "classifier": "head"}
        config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": {"depth": 2, "img_size": 64}}
        (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": pretrained}))
        fused = build(folder, num_labels=3)
        assert type(fused.image_processor).__name__ == "TimmWrapperImageProcessor"
        again = load(saved(fused, tmp_path / "head"))
        assert type(again.image_processor).__name__ == "TimmWrapperImageProcessor"
        features = extract_features(again, pictures, tmp_path / "features", dtype="float32", progress=False)
        assert len(features) == len(pictures)

    def test_in_child_module_taps():
        """The taps of arXiv 2603.05280 stand in timm's blocks as well; fused qkv changes nothing."""
        model = build(timm_backbone("vit"), num_labels=3, recipe="alf-paper")
        assert model.config.layout.final_norm == "timm_model.norm"
        block = model.backbone.timm_model.blocks[1]
        parts = {"ln1": block.norm1, "attention": block.attn, "ln2": block.norm2, "fc1": block.mlp.fc1}
        parts["fc2"] = block.mlp.fc2
        inside, seen = {"ln2": "residual", "fc2": "activation"}, {}

        def keep(name):
            def hook(module, inputs, output):
                seen[name] = output
                if name in inside:
                    seen[inside[name]] = inputs[0]

            return hook

        for name, part in parts.items():
            part.register_forward_hook(keep(name))
        pixels = timm_images(model)
        for name in (*parts, *inside.values()):
            tapped = build(model.backbone, num_labels=3, layers=[2], modules=[name], pools=["cls"])
            torch.testing.assert_close(tapped.extract_layer_features(pixels)[:, 0], seen[name][:, 0])

    def test_in_child_sizes():
        """A model built for any size takes other sizes; one that is not says so."""
        fixed = timm_backbone("vit")
        with pytest.raises((LayerFusionError, AssertionError), match=r"height \(96\) doesn't match model \(64\)"):
            build(fixed, num_labels=3)(torch.randn(1, 3, 96, 64))
        config = TimmWrapperConfig(
            architecture="vit_tiny_patch16_224", model_args={"depth": 2, "img_size": 64, "dynamic_img_size": True}
        )
        model = build(AutoModel.from_config(config), num_labels=3)
        assert model(torch.randn(1, 3, 96, 64)).logits.shape == (1, 3)

    def test_in_child_unknown_argument():
        """timm's forward takes no extras, such as transformers' interpolation of positions."""
        model = build(timm_backbone("vit"), num_labels=3)
        with pytest.raises(LayerFusionError, match="interpolate_pos_encoding"):
            model(timm_images(model), interpolate_pos_encoding=True)
