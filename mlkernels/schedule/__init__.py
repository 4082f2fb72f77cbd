"""Losses in turns: a snapshot of a run's state, and the schedule that is built on it."""

from .snapshot import Snapshot

__all__ = ["Snapshot"]
