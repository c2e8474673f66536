"""Studies: backbones x datasets x splits x recipes x seeds under one protocol, and their report."""

from .config import BackboneEntry, DatasetEntry, StudyConfig
from .protocol import PROTOCOLS, Protocol
from .report import write_report
from .results import StudyResults
from .run import ComputeOptions, run_study

__all__ = [
    "PROTOCOLS",
    "BackboneEntry",
    "ComputeOptions",
    "DatasetEntry",
    "Protocol",
    "StudyConfig",
    "StudyResults",
    "run_study",
    "write_report",
]
