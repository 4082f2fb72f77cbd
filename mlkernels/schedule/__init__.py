"""Losses in turns: a snapshot of a run's state, and the schedule that is built on it."""

from .mils import MILS, Statistics, Step
from .snapshot import Snapshot

__all__ = ["MILS", "Snapshot", "Statistics", "Step"]
