"""Open a page in the browser: drop a picture, see its classes and the layers that the head listened to.

The page is served to this machine alone and asks the network for nothing. Needs the extra hf-layerfusion[demo].
"""

from __future__ import annotations

import argparse

from ..demo import build_demo, launch_demo
from .options import add_device_option, number, open_model


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="HEAD", help="Hub id or folder of a head")
    parser.add_argument("--backbone", help="use this backbone instead of the pinned one (its weights are compared)")
    parser.add_argument(
        "--examples", nargs="+", default=[], metavar="PATH", help="pictures to click on: files, or folders of them"
    )
    parser.add_argument(
        "--port", type=number(int, at_least=1), help="of 127.0.0.1 (default: the first free one from 7860)"
    )
    parser.add_argument(
        "--share", action="store_true", help="also make a public address that anyone can open, by Gradio's servers"
    )
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    demo = build_demo(open_model(arguments), arguments.examples)
    launch_demo(demo, port=arguments.port, share=arguments.share)
