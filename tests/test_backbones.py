"""Opening backbones from folders and the Hub, refusing what would be random, and recognising weights."""

import json
import re
import shutil

import pytest
import torch
from backbone_zoo import tiny_config
from modeling_helpers import NUM_LAYERS, OTHER_BACKBONES, TABLE_BACKBONES, TINY, images, randomise, tiny_backbone
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Dinov2ForImageClassification,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import is_torchvision_available

from hf_layerfusion import LayerFusionError
from hf_layerfusion.backbones import WeightFingerprint, open_backbone, open_image_processor
from hf_layerfusion.probe import describe_backbone

_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def damaged_copy(folder, target, change):
    """A copy of a saved model whose tensors went through `change`."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    tiny_backbone("vit").save_pretrained(folder)
    return folder


# ---- opening -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [*TABLE_BACKBONES, *OTHER_BACKBONES])
def test_a_folder_opens_with_its_weights(model_type, tmp_path):
    saved = tiny_backbone(model_type)
    saved.save_pretrained(tmp_path)
    opened = open_backbone(tmp_path)
    assert type(opened.model) is type(saved)
    assert not opened.model.training
    assert opened.name_or_path == str(tmp_path.resolve())
    assert opened.revision is None
    assert opened.image_processor is None
    expected = saved.state_dict()
    found = opened.model.state_dict()
    assert found.keys() == {name for name in expected if not name.startswith("pooler.")}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert WeightFingerprint.of(opened.model) == WeightFingerprint.of(saved)


def test_a_relative_folder_is_recorded_in_full(vit_folder, monkeypatch):
    monkeypatch.chdir(vit_folder.parent)
    assert open_backbone(vit_folder.name).name_or_path == str(vit_folder.resolve())


@pytest.mark.parametrize(
    ("build", "tower"),
    [
        (lambda: ViTForImageClassification(ViTConfig(**TINY)), "vit"),
        (lambda: Dinov2ForImageClassification(tiny_backbone("dinov2").config), "dinov2"),
    ],
)
def test_a_classifier_s_folder_opens_although_its_pooler_is_missing(build, tower, tmp_path):
    classifier = randomise(build())
    classifier.save_pretrained(tmp_path)
    opened = open_backbone(tmp_path).model
    expected = getattr(classifier, tower).state_dict()
    assert opened.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in opened.state_dict().items())
    assert describe_backbone(opened).num_prefix_tokens == (1,) * (NUM_LAYERS + 1)


def _tiny_clip():
    return CLIPModel(CLIPConfig(vision_config=TINY, text_config=_TEXT, projection_dim=16))


def _tiny_siglip():
    return SiglipModel(SiglipConfig(vision_config=TINY, text_config=_TEXT))


@pytest.mark.parametrize(("build", "tower_class"), [(_tiny_clip, CLIPVisionModel), (_tiny_siglip, SiglipVisionModel)])
def test_of_an_image_text_model_the_vision_tower_is_taken(build, tower_class, tmp_path):
    full = randomise(build()).eval()
    full.save_pretrained(tmp_path)
    opened = open_backbone(tmp_path).model
    assert type(opened) is tower_class
    expected = full.vision_model.state_dict()
    assert opened.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in opened.state_dict().items())
    with torch.no_grad():
        outputs, reference = opened(images()), full.vision_model(images())
    assert torch.equal(outputs.last_hidden_state, reference.last_hidden_state)


COMPOSITES = {
    "align": "AlignVisionModel",
    "blip": "BlipVisionModel",
    "blip-2": "Blip2VisionModel",
    "bridgetower": "BridgeTowerVisionModel",
    "flava": "FlavaImageModel",
    "git": "GitVisionModel",
    "groupvit": "GroupViTVisionModel",
    "llava": "CLIPVisionModel",
    "mask2former": "SwinModel",
    "owlvit": "OwlViTVisionModel",
    "sam": "SamVisionModel",
    "sam2": "Sam2VisionModel",
    "siglip2": "Siglip2VisionModel",
}


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_the_tower_of_a_composite_is_the_same_from_its_folder_and_from_memory(model_type, tmp_path, caplog):
    torch.manual_seed(0)
    whole = AutoModel.from_config(tiny_config(model_type)).eval()
    whole.save_pretrained(tmp_path)
    opened, held = open_backbone(tmp_path).model, open_backbone(whole).model
    assert type(opened).__name__ == type(held).__name__ == COMPOSITES[model_type]
    assert WeightFingerprint.of(opened).difference(WeightFingerprint.of(held)) is None
    assert "MISSING" not in caplog.text
    assert len(WeightFingerprint.of(opened).parts) >= 3
    weights = {parameter.data_ptr() for parameter in whole.parameters()}
    assert {parameter.data_ptr() for parameter in held.parameters()} <= weights


def test_a_composite_without_its_tower_s_weights_is_refused(tmp_path):
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config("blip")).save_pretrained(tmp_path / "blip")

    def drop(tensors):
        for name in [name for name in tensors if name.endswith("encoder.layers.1.mlp.fc1.weight")]:
            del tensors[name]

    folder = damaged_copy(tmp_path / "blip", tmp_path / "damaged", drop)
    message = "lacks or misshapes 1 tensors of BlipVisionModel (encoder.layers.1.mlp.fc1.weight)"
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        open_backbone(folder)


def test_an_instance_is_taken_as_it_is():
    backbone = tiny_backbone("vit").train()
    opened = open_backbone(backbone, image_processor="mine")
    assert opened.model is backbone
    assert not backbone.training
    assert (opened.name_or_path, opened.revision, opened.image_processor) == (None, None, "mine")


@pytest.mark.parametrize(
    ("build", "tower"),
    [
        (lambda: ViTForImageClassification(ViTConfig(**TINY)), "vit"),
        (lambda: Dinov2ForImageClassification(tiny_backbone("dinov2").config), "dinov2"),
        (_tiny_clip, "vision_model"),
        (_tiny_siglip, "vision_model"),
    ],
)
def test_of_an_instance_with_a_head_the_backbone_is_taken(build, tower):
    full = build()
    opened = open_backbone(full).model
    assert opened is getattr(full, tower)
    assert describe_backbone(opened).num_layers == NUM_LAYERS


def test_an_instance_remembers_where_it_came_from(vit_folder):
    assert open_backbone(ViTModel.from_pretrained(vit_folder)).name_or_path == str(vit_folder)


def test_loading_options_for_an_instance_are_refused():
    with pytest.raises(LayerFusionError, match=re.escape("['dtype'] can only be given when the backbone is a Hub id")):
        open_backbone(tiny_backbone("vit"), dtype=torch.bfloat16)


def test_loading_options_reach_the_model(vit_folder):
    opened = open_backbone(vit_folder, dtype=torch.bfloat16, attn_implementation="eager").model
    assert opened.dtype == torch.bfloat16
    assert opened.config._attn_implementation == "eager"


def test_hub_revisions_are_pinned(hub, vit_folder, tmp_path):
    first = hub.upload_folder(vit_folder, "me/tiny-vit")
    other = ViTModel(ViTConfig(**TINY))
    other.save_pretrained(tmp_path)
    second = hub.upload_folder(tmp_path, "me/tiny-vit")
    assert first != second
    newest, pinned = open_backbone("me/tiny-vit"), open_backbone("me/tiny-vit", revision=first)
    assert (newest.name_or_path, newest.revision) == ("me/tiny-vit", second)
    assert pinned.revision == first
    assert WeightFingerprint.of(newest.model) == WeightFingerprint.of(other)
    assert WeightFingerprint.of(pinned.model) == WeightFingerprint.of(tiny_backbone("vit"))


# ---- refusing ----------------------------------------------------------------------------------------------------


def test_a_folder_without_a_config(tmp_path):
    message = f"backbone folder {tmp_path.resolve()} holds no config.json: is it a saved transformers model?"
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        open_backbone(tmp_path)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/folder", "no such folder"])
def test_a_backbone_that_does_not_exist(name):
    message = f"backbone {name!r} is neither a folder nor a Hub model that can be reached"
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        open_backbone(name)


def test_a_backbone_that_is_not_cached_cannot_be_opened_offline():
    with pytest.raises(LayerFusionError, match="backbone 'me/never-fetched' is neither a folder nor a Hub model"):
        open_backbone("me/never-fetched", local_files_only=True)


@pytest.mark.parametrize("lost", ["layernorm.weight", "embeddings.cls_token"])
def test_a_checkpoint_without_a_tensor_is_refused(vit_folder, tmp_path, lost):
    folder = damaged_copy(vit_folder, tmp_path / "damaged", lambda tensors: tensors.pop(lost))
    message = (
        f"the checkpoint of '{folder}' lacks or misshapes 1 tensors of ViTModel ({lost}): they would be random, so it "
        "is not used"
    )
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        open_backbone(folder)


def test_a_checkpoint_of_another_model_is_refused(vit_folder, tmp_path):
    folder = shutil.copytree(vit_folder, tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    message = r"lacks or misshapes 16 tensors of ViTModel \(layers.3.attention.k_proj.bias, .* and 13 more\)"
    with pytest.raises(LayerFusionError, match=message):
        open_backbone(folder)


def test_a_missing_pooler_is_no_reason_to_refuse(vit_folder, tmp_path):
    def drop_pooler(tensors):
        for name in [name for name in tensors if name.startswith("pooler.")]:
            del tensors[name]

    folder = damaged_copy(vit_folder, tmp_path / "poolerless", drop_pooler)
    assert WeightFingerprint.of(open_backbone(folder).model) == WeightFingerprint.of(tiny_backbone("vit"))


def _misshapen(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["layernorm.weight"] = torch.ones(31)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _without_weights(folder):
    (folder / "model.safetensors").unlink()


def _broken_config(folder):
    (folder / "config.json").write_text("{")


def _unknown_type(folder):
    (folder / "config.json").write_text('{"model_type": "vitt"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_misshapen, "layernorm.weight"),
        (_truncated, "damaged"),
        (_without_weights, "model.safetensors"),
        (_broken_config, "config.json"),
        (_unknown_type, "vitt"),
    ],
)
def test_a_damaged_folder_gives_one_clear_error(vit_folder, tmp_path, damage, message):
    folder = shutil.copytree(vit_folder, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        open_backbone(folder)


# ---- image processors --------------------------------------------------------------------------------------------


def test_the_stored_image_processor_comes_along(vit_folder, tmp_path):
    folder = shutil.copytree(vit_folder, tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    processor = open_backbone(folder).image_processor
    assert dict(processor.size) == {"height": 32, "width": 32}
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert open_backbone(folder, image_processor="mine").image_processor == "mine"


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision the type's own processor is used")
def test_a_processor_for_torchvision_only_has_a_stand_in(tmp_path):
    settings = {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "do_normalize": True,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = open_image_processor(str(tmp_path), {})
    assert isinstance(processor, ViTImageProcessorPil)
    assert dict(processor.size) == settings["size"]
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_no_image_processor_is_none(vit_folder):
    assert open_image_processor(str(vit_folder), {}) is None


# ---- fingerprints ------------------------------------------------------------------------------------------------


def fingerprint(model_type="vit", **changes):
    """Of a tiny backbone with some entries of its state dict moved by one."""
    backbone = tiny_backbone(model_type)
    with torch.no_grad():
        for name, index in changes.items():
            backbone.state_dict()[name.replace("__", ".")].view(-1)[index] += 1
    return WeightFingerprint.of(backbone)


def test_same_weights_same_fingerprint():
    first, second = fingerprint(), fingerprint()
    assert first == second
    assert first.difference(second) is None
    assert len(first.digest) == 64
    assert first.dtype == "float32"
    assert list(first.parts) == ["embeddings", "layernorm", "layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"layers__1__mlp__fc1__weight": 0}, "1 of 5 parts have other weights (layers.1)"),
        ({"layers__2__attention__q_proj__bias": -1}, "1 of 5 parts have other weights (layers.2)"),
        ({"embeddings__cls_token": 5}, "1 of 5 parts have other weights (embeddings)"),
        (
            {"layernorm__bias": 3, "layers__0__layernorm_after__weight": 3},
            "2 of 5 parts have other weights (layernorm, layers.0)",
        ),
        (
            {f"layers__{i}__layernorm_after__weight": 0 for i in range(3)} | {"layernorm__bias": 0},
            "4 of 5 parts have other weights (layernorm, layers.0, layers.1 and 1 more)",
        ),
    ],
)
def test_one_changed_value_is_located(changes, difference):
    assert fingerprint().difference(fingerprint(**changes)) == difference


def test_a_running_statistic_counts():
    changed = "encoder__stages__0__layers__0__layer__0__normalization__running_mean"
    assert "encoder.stages.0" in fingerprint("resnet").difference(fingerprint("resnet", **{changed: 0}))


def test_the_pooler_does_not_count():
    assert fingerprint() == fingerprint(pooler__dense__weight=0, pooler__dense__bias=0)
    without = ViTModel(ViTConfig(**TINY), add_pooling_layer=False)
    without.load_state_dict(tiny_backbone("vit").state_dict(), strict=False)
    assert WeightFingerprint.of(without) == fingerprint()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_recorded_and_counts(dtype):
    cast = WeightFingerprint.of(tiny_backbone("vit", dtype))
    assert cast.dtype == str(dtype).removeprefix("torch.")
    assert cast.digest != fingerprint().digest


def test_missing_and_added_parts_are_named():
    deeper = ViTModel(ViTConfig(**TINY | {"num_hidden_layers": 4}))
    shallow = ViTModel(ViTConfig(**TINY))
    deeper.load_state_dict(shallow.state_dict(), strict=False)
    first, second = WeightFingerprint.of(shallow), WeightFingerprint.of(deeper)
    assert first.difference(second) == "parts added: layers.3"
    assert second.difference(first) == "parts missing: layers.3"


def test_a_renamed_or_reshaped_tensor_changes_the_fingerprint():
    class Flat(PreTrainedModel):
        config_class = ViTConfig

        def __init__(self, name, shape):
            super().__init__(ViTConfig())
            self.register_buffer(name, torch.arange(6.0).reshape(shape))
            self.scale = torch.nn.Parameter(torch.ones(()))

    digests = {WeightFingerprint.of(Flat(name, shape)).digest for name in "ab" for shape in ((2, 3), (3, 2), (6,))}
    assert len(digests) == 6


def test_memory_layout_does_not_count():
    backbone = tiny_backbone("vit")
    weight = backbone.layers[0].mlp.fc1.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert WeightFingerprint.of(backbone) == fingerprint()


def test_round_trip_through_json():
    found = fingerprint()
    assert WeightFingerprint.from_dict(json.loads(json.dumps(found.to_dict()))) == found
