"""Backbone and head for servers: one ONNX file, one `torch.export` program, or one folder that needs no Hub."""

from __future__ import annotations

import importlib
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.utils import logging as transformers_logging

from .backbones import WeightFingerprint, execution_device, has_adapters, quantization_of
from .checkpoints import PROCESSOR_NAME
from .errors import LayerFusionError
from .files import write_json
from .heads import AttendingHead, EnsembleHead
from .hub.push import public_name
from .images import process_image, resize_processor, stack_images
from .modeling_layer_fusion import ViTForAttentiveLayerFusionClassification as Model

logger = transformers_logging.get_logger(__name__)

# Rounding, in units of the largest logit, or of 1 where all are smaller. Half precision depends on the order of sums.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

NUM_PICTURES = 5

# What the exporters say of themselves on every run: of torchvision's operators, and of norms they leave alone.
_CHATTY = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding")


def export_onnx(
    model: Model,
    path: str | Path,
    *,
    image_size: int | None = None,
    dynamic_batch: bool = True,
    check: bool = True,
    external_data: bool = False,
) -> Path:
    """Write backbone and head as one ONNX graph: `pixel_values` `(B, 3, H, W)` to `logits` `(B, C)`, both float32.

    Beside `model.onnx` stand `model.onnx.json` (class names, image processor, shapes, what it was made from and with)
    and `preprocessor_config.json`, so that a server needs nothing else. Weights of more than 2 GB, the limit of one
    ONNX file, go to `model.onnx.data`. The model is the same object in the same mode afterwards.

    Args:
        model: with its backbone, on the CPU. Adapters are merged in a copy.
        path: a file that ends in `.onnx`, or a folder, for `model.onnx` in it.
        image_size: pixels of height and width, if other than the image processor gives.
        dynamic_batch: leave B open; otherwise it is 1.
        check: run the written file with onnxruntime on pictures, in batches of several sizes, and compare its logits
            with PyTorch's.
        external_data: put smaller weights into a file of their own too.

    Returns:
        The ONNX file.

    Raises:
        LayerFusionError: if onnx, onnxscript or onnxruntime are missing; for a backbone that is quantised, offloaded,
            not on the CPU, that reads more than one image tensor, or cannot be traced; if the logits differ.
    """
    _require_packages("onnx", "onnxscript", *(["onnxruntime"] if check else []))

    def save(program: ExportedProgram, file: Path) -> dict[str, Any]:
        return _save_onnx(program, file, dynamic_batch, external_data)

    return _export(model, path, _Kind("ONNX", ".onnx", save, _load_onnx), image_size, dynamic_batch, check)


def export_program(
    model: Model,
    path: str | Path,
    *,
    image_size: int | None = None,
    dynamic_batch: bool = True,
    check: bool = True,
) -> Path:
    """Write backbone and head as one program of `torch.export`: `(B, 3, H, W)` to `(B, C)`, both float32.

    A server needs torch alone: `torch.export.load("model.pt2").module()(pixel_values)`. The rest is as for
    [`export_onnx`]; here the check runs the program as it was loaded from its file.

    Args:
        model: with its backbone, on the CPU. Adapters are merged in a copy.
        path: a file that ends in `.pt2`, or a folder, for `model.pt2` in it.
        image_size: pixels of height and width, if other than the image processor gives.
        dynamic_batch: leave B open; otherwise it is 1.
        check: compare the logits of the written program with PyTorch's.

    Returns:
        The program's file.

    Raises:
        LayerFusionError: as for [`export_onnx`].
    """
    kind = _Kind("torch.export", ".pt2", _save_program, _load_program)
    return _export(model, path, kind, image_size, dynamic_batch, check)


def merge(model: Model, output_dir: str | Path, *, check: bool = True) -> Path:
    """Write head, backbone, image processor and card into one folder that `from_pretrained` and `pipeline` load alone.

    It is `save_pretrained(include_backbone=True)`, and what servers need beyond it: adapters are merged into the
    backbone's weights (in a copy), timm's image processor, which cannot be saved, is replaced by one that can, and the
    folder is loaded and compared. The model is the same object in the same mode afterwards.

    Args:
        model: with its backbone and its image processor.
        output_dir: a new folder, or an empty one.
        check: load the folder and compare its logits on pictures with the model's.

    Returns:
        The folder.

    Raises:
        LayerFusionError: for a backbone that is quantised, offloaded or without weights, a model without image
            processor, a folder that holds files, or logits that differ.
    """
    folder = new_folder(output_dir)
    _refuse_backbone(model)
    if model.image_processor is None:
        raise LayerFusionError(
            "this model has no image processor, without which no server can read a picture: set model.image_processor"
        )
    with _evaluating(model):
        twin = _twin(model)
        twin.image_processor = _savable_processor(model.image_processor)
        # Of an adapted backbone, the pinned weights are those of the base.
        if twin.backbone is not model.backbone and twin.config.backbone_fingerprint is not None:
            twin.config.backbone_fingerprint = WeightFingerprint.of(twin.backbone).to_dict()
        with _staging(folder) as stage:
            whole = stage / folder.name
            twin.save_pretrained(whole, include_backbone=True)
            if check:
                loaded = type(model).from_pretrained(whole)
                inputs = _process(twin.image_processor, _pictures())
                device = execution_device(model.backbone)
                found = _logits(loaded.to(device), inputs)
                what = f"the merged model, as loaded from {folder},"
                _check_logits(_logits(model, inputs), found, what, model.backbone.dtype)
            if folder.is_dir():
                folder.rmdir()  # empty
            whole.replace(folder)
    return folder


def new_folder(path: str | Path) -> Path:
    """A folder that is not there yet, or empty.

    Raises:
        LayerFusionError: if there is something.
    """
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()):
        raise LayerFusionError(f"{folder} is not empty, and what is in it would mix with the model: give a new folder")
    if folder.exists() and not folder.is_dir():
        raise LayerFusionError(f"{folder} is a file: give a new folder")
    return folder


def program_file(path: str | Path, suffix: str) -> Path:
    """The file that is meant: the path itself, or `model` + suffix in a folder.

    Raises:
        LayerFusionError: if the path ends in something else.
    """
    path = Path(path)
    if path.is_dir() or not path.suffix:
        return path / f"model{suffix}"
    if path.suffix != suffix:
        raise LayerFusionError(f"{path} ends in {path.suffix!r}: give a file that ends in {suffix!r}, or a folder")
    return path


# ---- one program ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """How a program is written, and read back as a function from `(B, 3, H, W)` to `(B, C)`.

    `save` returns what is to be said of the file.
    """

    name: str
    suffix: str
    save: Callable[[ExportedProgram, Path], dict[str, Any]]
    load: Callable[[Path], Callable[[Tensor], Tensor]]


class _PixelsToLogits(nn.Module):
    """What is traced. `forward` of the model itself looks at the logits' values, which no program can."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.model.extract_layer_features(pixel_values)
        logits, _ = self.model._run_head(tokens, None)
        return logits.float()


def _export(
    model: Model, path: str | Path, kind: _Kind, image_size: int | None, dynamic_batch: bool, check: bool
) -> Path:
    file = program_file(path, kind.suffix)
    _refuse_backbone(model)
    if (device := model.backbone.device).type != "cpu" or model.head_device.type != "cpu":
        raise LayerFusionError(
            f"this model is on {device}, and its program would run there alone: call model.to('cpu')"
        )
    processor = None if model.image_processor is None else _savable_processor(model.image_processor)
    if processor is not None and image_size is not None:
        processor = resize_processor(processor, image_size)
    _refuse_other_processor(file.parent, processor)
    with _evaluating(model), _staging(file) as stage:
        inputs = _process(processor, _pictures(), _input_size(model, processor, image_size))
        pixels = inputs.pop("pixel_values")
        if inputs or pixels.ndim != 4:
            raise LayerFusionError(
                f"{type(model.backbone).__name__} reads {', '.join(['pixel_values', *inputs])}, of shape "
                f"{tuple(pixels.shape)}: only backbones that read images (B, 3, H, W) alone can be exported"
            )
        expected = _expected_logits(model, pixels)
        program = _trace(model, pixels, dynamic_batch)
        staged = stage / file.name
        said = kind.save(program, staged)
        del program  # as large as the model
        record = _describe(model, file, kind, pixels, dynamic_batch, processor) | said
        if check:
            record["check"] = _check_program(kind.load(staged), pixels, expected, dynamic_batch, model, kind)
        write_json(stage / f"{file.name}.json", record)
        if processor is not None:
            processor.save_pretrained(stage)
        # The program last: where it stands, the rest does too.
        for part in sorted(stage.iterdir(), key=lambda part: part == staged):
            part.replace(file.with_name(part.name))
    return file


def _trace(model: Model, pixels: Tensor, dynamic_batch: bool) -> ExportedProgram:
    twin = _twin(model)
    twin.head = deepcopy(model.head).requires_grad_(False)
    twin.token_projection = deepcopy(model.token_projection).requires_grad_(False)
    if isinstance(twin.head, AttendingHead | EnsembleHead):
        # The fast order chooses by the number of rows how it folds, and walks the batch in blocks.
        twin.head.implementation = "explicit"
    example = pixels[:2] if dynamic_batch else pixels[:1]
    shapes = ({0: Dim("batch", min=1)},) if dynamic_batch else None
    try:
        with _quiet():
            # Python runs as it is, hooks included, and torch records what it does.
            return torch.export.export(_PixelsToLogits(twin), (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch has an error of its own for everything that cannot be recorded
        cure = ": try dynamic_batch=False" if dynamic_batch else ""
        raise LayerFusionError(
            f"{type(model.backbone).__name__} cannot be traced by torch.export{cure} ({_first_line(error)})"
        ) from error


def _expected_logits(model: Model, pixels: Tensor) -> Tensor:
    try:
        return _logits(model, {"pixel_values": pixels})
    except LayerFusionError:
        raise
    except Exception as error:  # what a model raises on inputs of another rank or size is its own affair
        raise LayerFusionError(
            f"{type(model.backbone).__name__} cannot be run on images of shape {tuple(pixels.shape)} "
            f"({_first_line(error)}): only backbones that read images (B, 3, H, W) alone can be exported"
        ) from error


def _logits(model: Model, inputs: dict[str, Tensor]) -> Tensor:
    device = execution_device(model.backbone)
    return model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits.float().cpu()


def _check_program(
    run: Callable[[Tensor], Tensor],
    pixels: Tensor,
    expected: Tensor,
    dynamic_batch: bool,
    model: Model,
    kind: _Kind,
) -> dict[str, Any]:
    """Run it on batches of 1, 2 and all pictures, or on one picture after the other."""
    sizes = sorted({1, 2, len(pixels)}) if dynamic_batch else [1]
    starts = range(1) if dynamic_batch else range(len(pixels))
    worst = 0.0
    for size in sizes:
        for start in starts:
            rows = slice(start, start + size)
            what = f"the {kind.name} program, in a batch of {size},"
            try:
                found = run(pixels[rows])
            except Exception as error:  # torch's and onnxruntime's errors share no class
                raise LayerFusionError(
                    f"{what} cannot be run ({_first_line(error)}), so nothing was written"
                ) from error
            worst = max(worst, _check_logits(expected[rows], found, what, model.backbone.dtype))
    return {
        "max_abs_difference": worst,
        "max_abs_logit": float(expected.abs().max()),
        "num_pictures": len(pixels),
        "batch_sizes": sizes,
    }


def _check_logits(expected: Tensor, found: Tensor, what: str, dtype: torch.dtype) -> float:
    """The largest difference.

    Raises:
        LayerFusionError: naming it, if it is more than rounding.
    """
    if found.shape != expected.shape:
        raise LayerFusionError(
            f"the logits of {what} have shape {tuple(found.shape)} instead of {tuple(expected.shape)}, so nothing was "
            "written"
        )
    difference = (found.double() - expected.double()).abs()
    allowed = TOLERANCES[dtype] * max(1.0, float(expected.abs().max()))
    worst = float(difference.max())
    if not worst <= allowed:  # so written, NaN is refused too
        picture, label = divmod(int(difference.argmax()), difference.shape[1])
        raise LayerFusionError(
            f"the logits of {what} differ from PyTorch's by up to {worst:.2g} (picture {picture}, class {label}: "
            f"{float(found[picture, label]):.6g} instead of {float(expected[picture, label]):.6g}; {allowed:.2g} would "
            "be rounding), so nothing was written; check=False writes it all the same"
        )
    return worst


def _describe(
    model: Model, file: Path, kind: _Kind, pixels: Tensor, dynamic_batch: bool, processor: Any | None
) -> dict[str, Any]:
    config = model.config
    batch = "batch" if dynamic_batch else 1
    fingerprint = config.backbone_fingerprint or {}
    packages = ["hf_layerfusion", "torch", "transformers", *(["onnx", "onnxscript"] if kind.suffix == ".onnx" else [])]
    return {
        "file": file.name,
        "format": kind.name,
        "input": {"name": "pixel_values", "dtype": "float32", "shape": [batch, *pixels.shape[1:]]},
        "output": {"name": "logits", "dtype": "float32", "shape": [batch, config.num_labels]},
        "id2label": {str(index): config.id2label[index] for index in range(config.num_labels)},
        "problem_type": config.problem_type
        or ("regression" if config.num_labels == 1 else "single_label_classification"),
        "image_processor": None if processor is None else json.loads(processor.to_json_string()),
        "made_from": {
            "recipe": config.recipe,
            "head": public_name(model.name_or_path) if model.name_or_path else None,
            "backbone": public_name(config.backbone_name_or_path) if config.backbone_name_or_path else None,
            "backbone_revision": config.backbone_revision,
            "backbone_sha256": fingerprint.get("digest"),
        },
        "made_with": {package: str(importlib.import_module(package).__version__) for package in packages},
    }


def _save_program(program: ExportedProgram, file: Path) -> dict[str, Any]:
    with _quiet():
        torch.export.save(program, file)
    return {}


def _load_program(file: Path) -> Callable[[Tensor], Tensor]:
    with _quiet():
        return torch.export.load(file).module()


def _save_onnx(program: ExportedProgram, file: Path, dynamic_batch: bool, external_data: bool) -> dict[str, Any]:
    try:
        with _quiet():
            onnx_program: Any = torch.onnx.export(
                program,
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes=({0: "batch"},) if dynamic_batch else None,  # names the axis
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # an operator that ONNX lacks, and whatever else the translation comes upon
        raise LayerFusionError(
            f"the program cannot be translated to ONNX ({_first_line(error)}): export_program, or --format torch, may do"
        ) from error
    # Weights above the limit go to a file of their own in any case.
    onnx_program.save(file, external_data=external_data or None)
    return {"opset": onnx_program.model.opset_imports[""]}


def _load_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no class; bfloat16 is one it has no CPU kernels for
        raise LayerFusionError(
            f"onnxruntime cannot load the program on the CPU ({_first_line(error)}): load the backbone in float32, or "
            "write the program unchecked with check=False"
        ) from error
    return lambda pixels: torch.from_numpy(session.run(["logits"], {"pixel_values": pixels.numpy()})[0])


# ---- the model ------------------------------------------------------------------------------------------------------


def _refuse_backbone(model: Model) -> None:
    """Refuse what cannot be written whole."""
    backbone = model.backbone
    if backbone is None:
        raise LayerFusionError("this model holds a head only: load it with from_pretrained(..., backbone=...)")
    name = type(backbone).__name__
    if hasattr(backbone, "_hf_hook") or any(hasattr(module, "_hf_hook") for module in backbone.modules()):
        raise LayerFusionError(f"this {name} is offloaded or split over devices: load the head without device_map")
    if any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers())):
        raise LayerFusionError(f"this {name} or its head has no weights, it is on the meta device: load it first")
    if method := quantization_of(backbone):
        raise LayerFusionError(
            f"this {name} is {method}-quantised: load the head without quantization_config, and quantise what was written"
        )


def _twin(model: Model) -> Model:
    """The same weights in an object of its own, whose config and parts can change without the model's noticing."""
    twin = copy(model)
    twin._modules = dict(model._modules)
    twin.config = deepcopy(model.config)
    twin.backbone = _without_adapters(model.backbone)
    return twin


def _without_adapters(backbone: Any) -> Any:
    """The backbone, or a copy whose adapters are merged into its weights."""
    if not has_adapters(backbone):
        return backbone
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = deepcopy(backbone)
    for path, module in list(merged.named_modules()):
        if hasattr(module, "unload_and_optionally_merge_module"):  # of layers with a way of their own
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        elif isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        else:
            continue
        parent, _, name = path.rpartition(".")
        setattr(merged.get_submodule(parent), name, plain)
    merged._hf_peft_config_loaded = False  # transformers saves adapters by themselves where it is set
    return merged


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---- pictures -------------------------------------------------------------------------------------------------------


def _pictures() -> list[Image.Image]:
    """Landscape, portrait and square pictures with the amplitude spectrum of photographs, 1 / f (Field 1987).

    Their tokens differ more from picture to picture than those of white noise.
    """
    generator = np.random.default_rng(0)
    pictures = []
    for width, height in ((320, 240), (240, 320), (256, 256), (400, 300), (224, 280))[:NUM_PICTURES]:
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        amplitude = 1 / np.maximum(frequency, 1 / max(width, height))
        phases = np.exp(2j * np.pi * generator.random((3, *frequency.shape)))
        planes = np.fft.irfft2(amplitude * phases, s=(height, width))
        planes = planes[:1] + 0.5 * planes  # the channels of a photograph are alike
        pixels = 128 + 50 * (planes - planes.mean()) / planes.std()
        pictures.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)))
    return pictures


def _process(processor: Any, pictures: list[Image.Image], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """A batch of what the backbone reads; `size`, height and width, is what counts where there is no processor."""
    if processor is not None:
        return stack_images([process_image(processor, picture) for picture in pictures])
    assert size is not None
    resized = [np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC)) for picture in pictures]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    return {"pixel_values": ((pixels - 0.5) / 0.25).contiguous()}


def _input_size(model: Model, processor: Any, image_size: int | None) -> tuple[int, int] | None:
    """Height and width of the program's input where no processor says it."""
    if processor is not None:
        return None
    if image_size is not None:
        if type(image_size) is not int or image_size < 1:
            raise LayerFusionError(f"image_size={image_size!r}: give a number of pixels, for height and width")
        return image_size, image_size
    size = model.config.image_size or model.config.layout.image_size
    if size is None:
        raise LayerFusionError(
            "neither an image processor nor the backbone says how large its images are: give image_size"
        )
    return size[0], size[1]


def _savable_processor(processor: Any) -> Any:
    """The processor, or one of transformers that does what timm's does, whose settings cannot be saved.

    timm resizes the shorter side to the image size over `crop_pct` and crops the middle, or squashes the picture.
    Where an odd number of pixels is cut off, the two may differ by one of them in where they cut.

    Raises:
        LayerFusionError: if timm does something else.
    """
    settings = getattr(processor, "data_config", None)
    if settings is None:
        return processor
    height, width = settings["input_size"][-2:]
    share = settings.get("crop_pct") or 0.875  # timm's own default
    is_squashed = settings.get("crop_mode") == "squash"
    scaled = {"height": math.floor(height / share), "width": math.floor(width / share)}
    resample = getattr(Image.Resampling, str(settings.get("interpolation", "bicubic")).upper(), None)
    if resample is None or settings.get("crop_mode") not in ("center", "squash", None) or height != width:
        raise LayerFusionError(
            f"timm's image processor cannot be saved, and no other does {settings}: set model.image_processor to one of "
            "transformers"
        )
    plain = BitImageProcessorPil(
        size=scaled if is_squashed else {"shortest_edge": scaled["height"]},
        resample=resample,
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
        do_convert_rgb=True,
    )
    # Smooth ones, in which a cut that is one pixel off does not hide anything else.
    pictures = [picture.resize((4, 4)).resize(picture.size, Image.Resampling.BICUBIC) for picture in _pictures()]
    before, after = (_process(each, pictures)["pixel_values"] for each in (processor, plain))
    if before.shape != after.shape or (difference := float((before - after).abs().mean())) > 0.1:
        raise LayerFusionError(
            f"timm's image processor cannot be saved, and the one of transformers with its settings ({settings}) gives "
            "other pixels: set model.image_processor to one of transformers"
        )
    logger.warning(
        f"timm's image processor cannot be saved: a BitImageProcessor stands in for it, whose pixels differ by "
        f"{difference:.2g} on average on smooth pictures, in units of image_std"
    )
    return plain


# ---- files ----------------------------------------------------------------------------------------------------------


def _refuse_other_processor(folder: Path, processor: Any) -> None:
    file = folder / PROCESSOR_NAME
    if processor is None or not file.is_file():
        return
    if json.loads(file.read_text(encoding="utf-8")) != json.loads(processor.to_json_string()):
        raise LayerFusionError(
            f"{file} holds other settings than this program's images need, and something may rely on it: give a folder "
            "of its own"
        )


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder on the target's disk that is gone afterwards, so that only what is complete gets its final name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        yield Path(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings about their own insides."""
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _require_packages(*names: str) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise LayerFusionError(
                f"the export to ONNX needs {name} ({error}): pip install 'hf-layerfusion[export]'"
            ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n", 1)[0]
