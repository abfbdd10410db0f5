"""Measures steps, has a plan made of what they show, and carries it out. The engine comes in by `Autoplan` alone."""

from .autoplan import Autoplan

__all__ = ["Autoplan"]
