"""lighterage moves what PyTorch saves for backward off the device and back, one allocation at a time.

    offloader = lighterage.offload(model.layers, keep_last=2)

Same bits, less memory.
"""

from .engine.ledger import OffloadStats
from .engine.offloader import Offloader
from .engine.policy import Policy
from .engine.report import Report
from .engine.sections import LiveSection
from .errors import GraphError, OffloadError
from .graphs import make_graphed_callables
from .marks import mark_not_offload, mark_offload
from .offload import offload

__all__ = [
    "GraphError",
    "LiveSection",
    "OffloadError",
    "OffloadStats",
    "Offloader",
    "Policy",
    "Report",
    "make_graphed_callables",
    "mark_not_offload",
    "mark_offload",
    "offload",
]

__version__ = "0.1.0"
