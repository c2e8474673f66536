"""Compare recipes over backbones and datasets: every run of a YAML file, then one report.

  layerfusion study examples/configs/smoke.yaml --output_dir smoke

A study names backbones, datasets, recipes, a protocol, seeds and splits:

  name: pets
  backbones: [facebook/dinov2-small]
  datasets: [{name: pets, id: path/to/images, group_column: animal}]
  recipes: [linear-last, linear-all, alf, "linear-layer:*"]
  protocol: paper
  seeds: [0, 1, 2]
  splits: 3

Each backbone reads each dataset once for all recipes. Finished runs are kept one by one: after a kill the same command
does the rest, and recipes, datasets and seeds may be added later. OUTPUT_DIR/report has the tables and figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..features.manifest import STORAGE_DTYPES
from .options import add_batch_option, add_device_option, check_device, is_main_process, number, output_folder


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the study")
    parser.add_argument("--output_dir", help="folder of the study (default: outputs/studies/NAME)")
    parser.add_argument(
        "--num_processes", type=number(int, at_least=1), default=1, help="recipes run side by side (default: 1)"
    )
    add_batch_option(parser)
    parser.add_argument(
        "--num_workers", type=number(int, at_least=0), default=0, help="processes that decode images (default: 0)"
    )
    parser.add_argument(
        "--cache_dtype", choices=STORAGE_DTYPES, default="float16", help="of the cached tokens (default: float16)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace runs that were made from something else")
    parser.add_argument("--report_only", action="store_true", help="write the report of the runs that are there")
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    # Here, because it imports scikit-learn and scipy, which other commands do without.
    from ..study import ComputeOptions, StudyConfig, run_study, write_report

    check_device(arguments.device)
    config = StudyConfig.load(arguments.config)
    folder = output_folder("--output_dir", arguments.output_dir or str(Path("outputs", "studies", config.name)))
    if arguments.report_only:
        print(f"report: {write_report(folder)}")
        return
    compute = ComputeOptions(
        device=arguments.device,
        num_processes=arguments.num_processes,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        cache_dtype=arguments.cache_dtype,
    )
    report = run_study(config, folder, compute=compute, overwrite=arguments.overwrite)
    if is_main_process():
        print(f"report: {report}")
