"""Write head, backbone, image processor and card into one folder that needs no Hub.

A head's own folder names its backbone, which is fetched when the head is loaded. The merged folder holds both, so that
a server loads it without a network:
  import hf_layerfusion
  classify = transformers.pipeline("image-classification", model="merged")

Adapters (LoRA and its like) are merged into the backbone's weights. Before the folder gets its name, it is loaded and
its logits on pictures are compared with the head's. A single file that needs neither this library nor transformers is
what `layerfusion export` writes.

example:
  layerfusion merge --model my-head --output_dir merged
"""

from __future__ import annotations

import argparse

from ..export import merge, new_folder
from .options import add_model_options, open_model, output_folder


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--output_dir", required=True, help="a new folder, or an empty one")


def run(arguments: argparse.Namespace) -> None:
    folder = new_folder(output_folder("--output_dir", arguments.output_dir))
    arguments.device = "cpu"
    merge(open_model(arguments), folder)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    size = sum(file.stat().st_size for file in files)
    print(f"wrote {folder} ({size / 1e6:.1f} MB): {', '.join(file.name for file in files)}")
