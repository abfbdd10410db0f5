"""CUDA graphs of modules and functions, with whatever offload is attached to them."""

from .making import make_graphed_callables
from .replaying import Graphed

__all__ = ["Graphed", "make_graphed_callables"]
