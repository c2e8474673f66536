"""Entry point of the `layerfusion` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import LayerFusionError
from ..version import __version__
from . import cache, demo, evaluate, explain, export, extract, info, merge, predict, push, study, sweep, train
from .options import OptionsError

COMMANDS = (info, extract, cache, sweep, train, evaluate, predict, explain, study, push, demo, export, merge)

EPILOG = """\
a first session:
  layerfusion info facebook/dinov2-small
  layerfusion train --backbone facebook/dinov2-small --dataset path/to/images --output_dir my-head
  layerfusion train --backbone facebook/dinov2-small --dataset path/to/images --output_dir best-head --sweep paper
  layerfusion predict --model my-head picture.png
  layerfusion explain --model my-head --dataset path/to/images --output_dir my-head/attention

exit status: 0 done; 1 the input cannot be used (one line on standard error says why); 2 wrong options
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="layerfusion",
        description="Classify images with every layer of a frozen vision backbone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        name = command.__name__.rsplit(".", 1)[-1]
        summary = (command.__doc__ or "").split("\n", 1)[0]
        subparser = commands.add_parser(
            name,
            help=summary,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except OptionsError as error:
        print(f"layerfusion {arguments.command}: {error}", file=sys.stderr)
        return 2
    except (LayerFusionError, OSError) as error:  # such as a full disk, or a folder that may not be read
        print(f"layerfusion {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\ninterrupted; finished shards of features are kept, a sweep's last saved state, and finished runs of a study",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
