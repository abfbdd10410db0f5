"""Decides what to keep, to move and to compute again, from what was measured of a step.

Knows numbers: no torch, no GPU.
"""
