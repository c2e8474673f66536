"""Programs and folders for servers: they give the model's logits by themselves, and making them changes no model."""

import argparse
import json
import math
from types import SimpleNamespace

import accelerate
import numpy as np
import peft
import pytest
import torch
from backbone_zoo import build
from modeling_helpers import IMAGE_SIZE, TINY, images, randomise, tiny_backbone
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
    pipeline,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from hf_layerfusion import ViTForAttentiveLayerFusionClassification, export
from hf_layerfusion.backbones import open_image_processor
from hf_layerfusion.cli import export as export_command
from hf_layerfusion.cli import merge as merge_command
from hf_layerfusion.errors import LayerFusionError
from hf_layerfusion.export import export_onnx, export_program, merge
from hf_layerfusion.images import process_image, stack_images

CLASSES = ["ä", "b", "c"]
SHALLOW = TINY | {"num_hidden_layers": 2}
_SHALLOW_DINOV2 = {key: value for key, value in SHALLOW.items() if key != "intermediate_size"} | {"mlp_ratio": 2}

# By name: a backbone, and what its head reads.
FAMILIES = {
    "vit": (lambda: ViTModel(ViTConfig(**SHALLOW), add_pooling_layer=False), {"num_queries": 2}),
    "dinov2-registers, all tokens": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**_SHALLOW_DINOV2, num_register_tokens=2)),
        {"recipe": "aat"},
    ),
    "vit, two stages": (
        lambda: ViTModel(ViTConfig(**SHALLOW), add_pooling_layer=False),
        {"head_type": "two_stage", "pools": ["cls", "max", "top:2@middle", "grid:2"]},
    ),
    "clip, linear": (lambda: CLIPVisionModel(CLIPVisionConfig(**SHALLOW)), {"recipe": "linear-all"}),
    "siglip, scalar mix": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**SHALLOW, vision_use_head=False)),
        {"recipe": "scalar-mix"},
    ),
    "swin, projected widths": (
        lambda: SwinModel(
            SwinConfig(
                embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=IMAGE_SIZE, patch_size=4
            )
        ),
        {"width_alignment": "project", "layers": [0, 1, 2]},
    ),
    "convnext": (
        lambda: ConvNextModel(
            ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=IMAGE_SIZE)
        ),
        {},
    ),
}


def processor_of(size=IMAGE_SIZE):
    return BitImageProcessorPil(size={"shortest_edge": size + 4}, crop_size={"height": size, "width": size})


def build_model(family="vit", **options):
    """A head with random parameters and logits of several units, on a backbone with random parameters."""
    torch.manual_seed(1)
    make_backbone, head = FAMILIES[family]
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        randomise(make_backbone()).eval(), id2label=CLASSES, image_processor=processor_of(), **head, **options
    )
    with torch.no_grad():
        randomise(model.token_projection)
        model.head.classifier.weight.mul_(30)
    return model


def logits_of(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values).logits


def runner(file):
    """Run a program as a server does: with onnxruntime, or with torch alone."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])


def need_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")


def arguments_of(command, *values):
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    return parser.parse_args([str(value) for value in values])


def state_of(model):
    """Everything that an export could leave changed."""
    return {
        "config": model.config.to_dict(),
        "modes": [(name, module.training) for name, module in model.named_modules()],
        "modules": [id(module) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "tensors": [(name, tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "processor": model.image_processor.to_dict(),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": str(np.random.get_state()),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }


def no_files(folder):
    return not folder.exists() or not list(folder.iterdir())


# ---- programs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """A head in training mode, on a backbone that is trained too."""
    model = build_model(freeze_backbone=False)
    model.config.backbone_name_or_path = "some/backbone"
    return model.train()


@pytest.fixture(scope="module")
def program(model, tmp_path_factory):
    """The file, and whether the model was the same before and after."""
    before = state_of(model)
    file = export_program(model, tmp_path_factory.mktemp("program") / "tiny.pt2")
    return file, before == state_of(model)


@pytest.fixture(scope="module")
def onnx_program(tmp_path_factory):
    """The file, written by the command from a saved head, and that head."""
    need_onnx()
    folder = tmp_path_factory.mktemp("onnx")
    model = build_model()
    model.save_pretrained(folder / "head", include_backbone=True)
    arguments = arguments_of(export_command, "--model", folder / "head", "--output", folder / "served")
    export_command.run(arguments)
    return folder / "served" / "model.onnx", model


def assert_same_logits(file, model):
    run = runner(file)
    for batch_size in (1, 3, 6):
        pixels = images(batch_size, seed=batch_size)
        found, expected = run(pixels), logits_of(model, pixels)
        assert found.dtype == torch.float32
        assert expected.abs().max() > 1  # a scale at which the tolerance says something
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_program_gives_the_model_s_logits_for_any_batch(program, model):
    file, _ = program
    evaluating = build_model(freeze_backbone=False)
    evaluating.load_state_dict(model.state_dict())
    assert_same_logits(file, evaluating.eval())


def test_the_model_is_the_same_afterwards(program):
    _, is_same = program
    assert is_same


def test_the_onnx_command_gives_the_model_s_logits_for_any_batch(onnx_program):
    import onnxruntime

    file, model = onnx_program
    assert_same_logits(file, model)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape) == ("pixel_values", "tensor(float)", ["batch", 3, 32, 32])
    assert (given.name, given.type, given.shape) == ("logits", "tensor(float)", ["batch", 3])
    record = json.loads(file.with_name(f"{file.name}.json").read_text(encoding="utf-8"))
    assert record["made_with"].keys() == {"hf_layerfusion", "torch", "transformers", "onnx", "onnxscript"}


def test_what_stands_beside_a_program_is_all_a_server_needs(program, model):
    file, _ = program
    assert sorted(part.name for part in file.parent.iterdir()) == [
        "preprocessor_config.json",
        "tiny.pt2",
        "tiny.pt2.json",
    ]
    record = json.loads((file.parent / "tiny.pt2.json").read_text(encoding="utf-8"))
    assert [record["id2label"][str(index)] for index in range(3)] == CLASSES
    assert record["problem_type"] == "single_label_classification"
    assert record["input"] == {"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, 32, 32]}
    assert record["output"] == {"name": "logits", "dtype": "float32", "shape": ["batch", 3]}
    assert record["made_from"]["backbone"] == "some/backbone"
    assert record["made_from"]["backbone_sha256"] == model.config.backbone_fingerprint["digest"]
    assert record["made_with"]["torch"] == torch.__version__
    assert record["check"]["batch_sizes"] == [1, 2, 5]
    assert 0 <= record["check"]["max_abs_difference"] < 1e-4
    assert record["image_processor"] == json.loads((file.parent / "preprocessor_config.json").read_text())
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8))
    processor = open_image_processor(str(file.parent), {})
    expected = process_image(model.image_processor, picture)["pixel_values"]
    torch.testing.assert_close(process_image(processor, picture)["pixel_values"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "vit"])
def test_families_and_heads(family, tmp_path):
    model = build_model(family)
    assert_same_logits(export_program(model, tmp_path), model)
    need_onnx()
    assert_same_logits(export_onnx(model, tmp_path), model)


@pytest.mark.slow
def test_another_size_in_batches_of_one_without_a_processor(tmp_path):
    model = build_model()
    model.image_processor = None
    file = export_program(model, tmp_path / "fixed.pt2", image_size=48, dynamic_batch=False)
    pixels = images(1, size=48)
    torch.testing.assert_close(runner(file)(pixels), logits_of(model, pixels), rtol=0, atol=1e-4)
    record = json.loads((tmp_path / "fixed.pt2.json").read_text())
    assert record["input"]["shape"] == [1, 3, 48, 48]
    assert record["image_processor"] is None
    assert not (tmp_path / "preprocessor_config.json").exists()


@pytest.mark.slow
def test_a_real_head_gives_the_same_classes_on_200_digits(backbone_folder, tmp_path):
    data = load_digits()
    labels = torch.from_numpy(data.target[:200])
    torch.manual_seed(0)
    model = ViTForAttentiveLayerFusionClassification.from_backbone(backbone_folder, num_labels=10, image_size=56)
    pictures = [Image.fromarray(np.uint8(values * 255 / 16)).convert("RGB") for values in data.images[:200]]
    pixels = stack_images([process_image(model.image_processor, picture) for picture in pictures])["pixel_values"]
    batches = pixels.split(25)
    tokens = torch.cat([model.extract_layer_features(batch) for batch in batches])
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-3)
    model.train()
    for _ in range(30):
        model(layer_features=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        expected = model(layer_features=tokens).logits
    assert 5 < expected.abs().max() < 25
    assert (expected.argmax(dim=1) == labels).float().mean() > 0.9
    exports = [export_program]
    if all(_is_installed(package) for package in ("onnx", "onnxscript", "onnxruntime")):
        exports.append(export_onnx)
    for write in exports:
        run = runner(write(model, tmp_path))
        with torch.no_grad():
            found = torch.cat([run(batch) for batch in batches])
        assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def _is_installed(package):
    try:
        __import__(package)
    except ImportError:
        return False
    return True


# ---- what goes wrong ------------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """A program of the right shapes that is no classifier, and quick to trace."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 7.0))

    def forward(self, pixel_values):
        return pixel_values.mean(dim=(1, 2, 3))[:, None] * self.weight


@pytest.fixture
def wrongly_traced(monkeypatch):
    shapes = ({0: torch.export.Dim("batch", min=1)},)

    def trace(_model, pixels, _dynamic_batch):
        return torch.export.export(Wrong(), (pixels,), dynamic_shapes=shapes)

    monkeypatch.setattr(export, "_trace", trace)


def test_a_program_that_computes_something_else_is_not_written(wrongly_traced, tmp_path):
    with pytest.raises(LayerFusionError, match=r"torch.export program, in a batch of 1, differ .* by up to \d.*class"):
        export_program(build_model(), tmp_path / "folder")
    assert no_files(tmp_path / "folder")


def test_an_onnx_program_that_computes_something_else_is_not_written(wrongly_traced, tmp_path):
    need_onnx()
    with pytest.raises(LayerFusionError, match=r"ONNX program, in a batch of 1, differ .* by up to \d.*class"):
        export_onnx(build_model(), tmp_path)
    assert no_files(tmp_path)


def test_weights_in_a_file_of_their_own(wrongly_traced, tmp_path):
    """As it is for more than 2 GB."""
    need_onnx()
    file = export_onnx(build_model(), tmp_path / "wide.onnx", external_data=True, check=False)
    parts = {"wide.onnx", "wide.onnx.data", "wide.onnx.json", "preprocessor_config.json"}
    assert {part.name for part in tmp_path.iterdir()} == parts
    assert "check" not in json.loads((tmp_path / "wide.onnx.json").read_text())
    pixels = images(4)
    torch.testing.assert_close(runner(file)(pixels), Wrong()(pixels).detach())


def test_what_cannot_be_traced_is_an_error(monkeypatch, tmp_path):
    model = build_model()
    run_head = type(model)._run_head

    def by_value(self, tokens, *others):
        return run_head(self, tokens, *others) if tokens.sum() > 0 else (tokens[:, 0], None)

    monkeypatch.setattr(type(model), "_run_head", by_value)
    with pytest.raises(LayerFusionError, match=r"ViTModel cannot be traced by torch\.export: try dynamic_batch=False"):
        export_program(model, tmp_path)
    assert no_files(tmp_path)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda _: torch.zeros(2, 3), r"have shape \(2, 3\) instead of \(1, 3\)"),
        (lambda pixels: torch.full((len(pixels), 3), torch.nan), "differ from PyTorch's by up to nan"),
        (lambda pixels: pixels.view(7, -1, 11, 13), r"cannot be run \(RuntimeError: .*\), so nothing was written"),
    ],
)
def test_a_program_that_fails_when_run_is_not_written(run, message, wrongly_traced, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "_load_program", lambda _: run)
    with pytest.raises(LayerFusionError, match=message):
        export_program(build_model(), tmp_path)
    assert no_files(tmp_path)


def quantised(model):
    model.backbone.config.quantization_config = {"quant_method": "torchao"}


def offloaded(model):
    accelerate.cpu_offload(model.backbone, execution_device="cpu")


def headless(model):
    model.backbone = None


def without_processor(model):
    model.image_processor = None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (quantised, "torchao-quantised: load the head without quantization_config"),
        (offloaded, "offloaded .*: load the head without device_map"),
        (lambda model: model.to("meta"), "meta device"),
        (headless, "holds a head only"),
    ],
)
@pytest.mark.parametrize("write", [export_program, merge])
def test_models_that_are_refused(write, spoil, message, tmp_path):
    model = build_model()
    spoil(model)
    with pytest.raises(LayerFusionError, match=message):
        write(model, tmp_path / "out")
    assert no_files(tmp_path / "out")


def test_models_on_other_devices_are_refused(monkeypatch, tmp_path):
    model = build_model()
    monkeypatch.setattr(type(model.backbone), "device", torch.device("cuda:0"))
    with pytest.raises(LayerFusionError, match=r"on cuda:0.*model\.to\('cpu'\)"):
        export_program(model, tmp_path)


def test_backbones_that_read_more_than_an_image_are_refused(tmp_path):
    backbone = build("siglip2_vision_model")
    processor = Siglip2ImageProcessorPil(patch_size=backbone.config.patch_size, max_num_patches=32)
    model = ViTForAttentiveLayerFusionClassification.from_backbone(backbone, num_labels=2, image_processor=processor)
    with pytest.raises(LayerFusionError, match=r"pixel_values, pixel_attention_mask, spatial_shapes.* alone"):
        export_program(model, tmp_path)


def test_sizes_that_the_head_cannot_read_are_refused(tmp_path):
    model = build_model("dinov2-registers, all tokens")
    with pytest.raises(LayerFusionError, match=r"the bank has 16 patches .* but these images give 36"):
        export_program(model, tmp_path, image_size=48)
    model.image_processor = None
    with pytest.raises(LayerFusionError, match="image_size=0"):
        export_program(model, tmp_path, image_size=0)


@pytest.mark.parametrize(
    ("write", "name", "message"),
    [
        (export_program, "model.onnx", r"'\.onnx': give a file that ends in '\.pt2', or a folder"),
        (merge, "full", "is not empty.*give a new folder"),
        (merge, "full/file", "is a file"),
        (export_program, "full", "preprocessor_config.json holds other settings"),
    ],
)
def test_places_that_are_refused(write, name, message, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    processor_of(size=64).save_pretrained(tmp_path / "full")
    with pytest.raises(LayerFusionError, match=message):
        write(build_model(), tmp_path / name)
    assert {part.name for part in (tmp_path / "full").iterdir()} == {"file", "preprocessor_config.json"}


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    monkeypatch.setitem(__import__("sys").modules, "onnx", SimpleNamespace())
    with pytest.raises(LayerFusionError, match=r"needs onnxscript .*hf-layerfusion\[export\]"):
        export_onnx(build_model(), tmp_path)


# ---- one folder -----------------------------------------------------------------------------------------------------


def picture():
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (60, 44, 3), dtype=np.uint8))


def test_merge_gives_a_folder_that_needs_nothing_else(tmp_path, capsys):
    backbone, head, merged = (tmp_path / name for name in ("backbone", "head", "merged"))
    tiny_backbone("dinov2").save_pretrained(backbone)
    processor_of().save_pretrained(backbone)
    model = ViTForAttentiveLayerFusionClassification.from_backbone(str(backbone), id2label=CLASSES)
    model.save_pretrained(head)
    merged.mkdir()
    merge_command.run(arguments_of(merge_command, "--model", head, "--output_dir", merged))
    assert "model.safetensors" in capsys.readouterr().out
    backbone.rename(tmp_path / "elsewhere")
    pixels = images(3)
    loaded = ViTForAttentiveLayerFusionClassification.from_pretrained(merged)
    torch.testing.assert_close(logits_of(loaded, pixels), logits_of(model, pixels))
    found, expected = (
        pipeline("image-classification", model=given, image_processor=processor)(picture())
        for given, processor in ((str(merged), None), (model, model.image_processor))
    )
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], abs=1e-6)
    assert {row["label"] for row in found} == set(CLASSES)
    assert "backbone's weights are in this repository" in (merged / "README.md").read_text(encoding="utf-8")
    assert [part.name for part in tmp_path.iterdir() if part.name.startswith(".")] == []


@pytest.mark.parametrize("freeze_backbone", [True, False])
def test_merge_puts_adapters_into_the_weights_of_a_copy(freeze_backbone, tmp_path):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_backbone("vit"), lora)
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        adapted, id2label=CLASSES, image_processor=processor_of(), freeze_backbone=freeze_backbone
    ).train()
    before = state_of(model)
    folder = merge(model, tmp_path / "merged")
    assert state_of(model) == before
    loaded = ViTForAttentiveLayerFusionClassification.from_pretrained(folder)
    assert not any("lora" in name for name in loaded.state_dict())
    pixels = images(3)
    expected = logits_of(model.eval(), pixels)
    torch.testing.assert_close(logits_of(loaded, pixels), expected, rtol=0, atol=1e-4)
    with adapted.disable_adapter():
        assert (logits_of(model, pixels) - expected).abs().max() > 1e-3  # the adapters matter


def test_a_merged_folder_that_gives_other_logits_is_not_written(monkeypatch, tmp_path):
    model = build_model()
    monkeypatch.setattr(type(model), "from_pretrained", lambda _: build_model("convnext"))
    with pytest.raises(LayerFusionError, match=r"the merged model, as loaded from .* differ from PyTorch's by up to"):
        merge(model, tmp_path / "merged")
    assert no_files(tmp_path)


def test_merge_needs_an_image_processor(tmp_path):
    model = build_model()
    without_processor(model)
    with pytest.raises(LayerFusionError, match=r"no image processor.*set model\.image_processor"):
        merge(model, tmp_path / "merged")


class TimmProcessor:
    """What timm's image processor does to a picture, by its settings; it cannot be saved."""

    def __init__(self, **settings):
        self.data_config = {
            "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
            "mean": (0.4, 0.5, 0.6),
            "std": (0.2, 0.25, 0.3),
            "interpolation": "bilinear",
            "crop_pct": 0.8,
            "crop_mode": "center",
            **settings,
        }

    def __call__(self, images, return_tensors):
        size, share = IMAGE_SIZE, self.data_config["crop_pct"]
        shorter = math.floor(size / share)
        resized = (shorter, shorter)
        if self.data_config["crop_mode"] != "squash":
            factor = shorter / min(images.size)
            resized = tuple(int(side * factor) for side in images.size)
        filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        scaled = np.asarray(images.resize(resized, filters[self.data_config["interpolation"]]))
        top, left = ((side - size) // 2 for side in scaled.shape[:2])
        pixels = scaled[top : top + size, left : left + size] / 255
        pixels = (pixels - np.array(self.data_config["mean"])) / np.array(self.data_config["std"])
        return {"pixel_values": torch.from_numpy(pixels).permute(2, 0, 1)[None].float()}


@pytest.mark.parametrize("settings", [{}, {"crop_mode": "squash"}, {"interpolation": "bicubic", "crop_pct": 1.0}])
def test_merge_replaces_timm_s_image_processor(settings, tmp_path):
    model = build_model()
    model.image_processor = TimmProcessor(**settings)
    folder = merge(model, tmp_path / "merged")
    loaded = ViTForAttentiveLayerFusionClassification.from_pretrained(folder)
    found, expected = (
        process_image(each, picture())["pixel_values"] for each in (loaded.image_processor, model.image_processor)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert isinstance(model.image_processor, TimmProcessor)


@pytest.mark.parametrize("settings", [{"crop_mode": "border"}, {"interpolation": "random"}, {"std": (2.0, 2.0, 2.0)}])
def test_timm_processors_that_cannot_be_replaced_are_refused(settings, tmp_path):
    model = build_model()
    model.image_processor = TimmProcessor(**settings)
    if "std" in settings:  # it says one thing and does another
        model.image_processor.__class__ = type("Odd", (TimmProcessor,), {"__call__": _doubled})
    with pytest.raises(LayerFusionError, match=r"timm's image processor cannot be saved.*set model\.image_processor"):
        merge(model, tmp_path / "merged")


def _doubled(self, images, return_tensors):
    return {"pixel_values": 2 * TimmProcessor.__call__(self, images, return_tensors)["pixel_values"] + 1}


def test_a_backbone_that_moved_is_named_without_its_path(model, tmp_path):
    """A record travels; where somebody's folder was, whether or not it is still there, does not."""
    here = model.config.backbone_name_or_path
    model.config.backbone_name_or_path = str(tmp_path / "gone" / "my-vit")
    try:
        file = export_program(model, tmp_path / "out", check=False)
    finally:
        model.config.backbone_name_or_path = here
    record = json.loads(file.with_name(f"{file.name}.json").read_text(encoding="utf-8"))
    assert record["made_from"]["backbone"] == "my-vit"
