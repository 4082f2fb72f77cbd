"""Processes of torch.distributed: many scenes in one set of them, because starting them takes longer than they do."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def run(scenes: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """scenes(rank, *arguments) in so many processes, which share a gloo group."""
    # Forked from one that has imported what takes seconds; it has run nothing, so that there is no thread to lose.
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed.tensor", "pytest", "mlkernels.distributed"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.start_processes(
        _rank, args=(scenes, ranks, store.port, arguments), nprocs=ranks, start_method="forkserver"
    )


def _rank(rank: int, scenes: Callable[..., None], ranks: int, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    # Ranks that disagree wait for each other.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=90))
    try:
        scenes(rank, *arguments)
    finally:
        dist.destroy_process_group()
