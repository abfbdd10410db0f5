"""lighterage moves what PyTorch saves for backward off the device and back, one allocation at a time.

    offloader = lighterage.offload(model.layers, keep_last=2)

Same bits, less memory.
"""

from .engine.checkpoint_contexts import selective_checkpoint_contexts
from .engine.ledger import OffloadStats
from .engine.offloader import Offloader
from .engine.policy import Policy
from .engine.report import Report
from .engine.sections import LiveSection
from .errors import BudgetError, GraphError, OffloadError
from .graphs import make_graphed_callables
from .marks import mark_not_offload, mark_offload
from .offload import offload
from .planner.choose import plan
from .planner.goal import Goal
from .planner.plan import Plan
from .planner.prediction import Prediction
from .planner.simulate import simulate
from .planner.timeline import Link, Timeline

__all__ = [
    "BudgetError",
    "Goal",
    "GraphError",
    "Link",
    "LiveSection",
    "OffloadError",
    "OffloadStats",
    "Offloader",
    "Plan",
    "Policy",
    "Prediction",
    "Report",
    "Timeline",
    "make_graphed_callables",
    "mark_not_offload",
    "mark_offload",
    "offload",
    "plan",
    "selective_checkpoint_contexts",
    "simulate",
]

__version__ = "0.1.0"
