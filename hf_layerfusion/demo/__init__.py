"""A page to look at: drop a picture, see its classes and the layers that a head listened to."""

from .app import build_demo, find_examples, launch_demo

__all__ = ["build_demo", "find_examples", "launch_demo"]
