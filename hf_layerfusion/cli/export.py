"""Write backbone and head as one program for a server: ONNX, or torch.export.

The program takes pixel_values (batch, 3, height, width) and gives logits (batch, classes), both float32; any batch
size will do. Before it gets its name, it is run on pictures and compared with PyTorch. Beside it stand two files:
  model.onnx.json           class names, image size, the image processor's settings, what it was made from and with
  preprocessor_config.json  the image processor, as AutoImageProcessor.from_pretrained reads it

onnx needs the packages of pip install 'hf-layerfusion[export]' here, and onnxruntime on the server:
  session = onnxruntime.InferenceSession("model.onnx")
  logits = session.run(["logits"], {"pixel_values": pixels})[0]
torch needs torch alone on the server:
  program = torch.export.load("model.pt2").module()
  logits = program(pixels)

A folder for servers that have this library, `pipeline` included, is what `layerfusion merge` writes.

examples:
  layerfusion export --model my-head --output served
  layerfusion export --model my-head --format torch --output served/digits.pt2 --image_size 112
"""

from __future__ import annotations

import argparse
import json

from ..export import export_onnx, export_program, program_file
from .options import add_model_options, number, open_model, output_folder

FORMATS = {"onnx": (export_onnx, ".onnx"), "torch": (export_program, ".pt2")}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: onnx")
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE_OR_DIR",
        help="a file that ends in .onnx or .pt2, or a folder, for model.onnx or model.pt2 in it",
    )
    parser.add_argument(
        "--image_size",
        type=number(int, at_least=1),
        help="pixels of height and width, if other than the head's image processor gives; accuracy may differ",
    )


def run(arguments: argparse.Namespace) -> None:
    export, suffix = FORMATS[arguments.format]
    file = program_file(arguments.output, suffix)
    output_folder("--output", str(file.parent))
    arguments.device = "cpu"  # a program runs where it was traced
    model = open_model(arguments)
    file = export(model, file, image_size=arguments.image_size)
    record = json.loads(file.with_name(f"{file.name}.json").read_text(encoding="utf-8"))
    check = record["check"]
    print(f"pixel_values {record['input']['shape']} -> logits {record['output']['shape']}")
    print(
        f"logits differ from PyTorch's by at most {check['max_abs_difference']:.1e} on {check['num_pictures']} pictures, "
        f"in batches of {', '.join(map(str, check['batch_sizes']))}; the largest logit is {check['max_abs_logit']:.1f}"
    )
    size = sum(part.stat().st_size for part in (file, file.with_name(f"{file.name}.data")) if part.exists())
    print(f"wrote {file} ({size / 1e6:.1f} MB), {file.name}.json and preprocessor_config.json")
