"""Scenes of test_class_parallel.py: what the kernel has sent for a rank, against what the documentation promises."""

from __future__ import annotations

import os
import socket
import struct
import sys

import pytest
import torch
import torch.distributed as dist

import mlkernels
from mlkernels.distributed import ClassParallelLoss, class_parallel_softmax_loss, communication

ROWS, WIDTH, CLASSES = 256, 64, 200  # rows of a rank
#: Where tcp_info of linux/tcp.h has tcpi_bytes_sent, and tcpi_bytes_retrans behind it.
SENT = 200


def bytes_sent() -> int:
    """By this process's connections, but for the store's; what a busy machine sends again counts once."""
    store = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            one = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with one:
            if one.type != socket.SOCK_STREAM or one.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            try:
                port = one.getpeername()[1]
            except OSError:  # it listens
                continue
            if port != store.port:
                sent, again = struct.unpack_from("QQ", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), SENT)
                total += sent - again
    return total


def promised(ranks: int, numbers: int) -> int:
    """docs/distributed.md: sizes, labels, features, statistics, gradients, upstream."""
    others = ranks - 1
    return others * (32 + 8 * ROWS + 4 * WIDTH * ROWS + 4 * numbers * ROWS * ranks + 4 * WIDTH * ROWS + 4)


def wire(rank: int) -> None:
    """A step of a linear head and one on sharded logits, as many bytes as promised and 5 % for gloo's headers."""
    ranks = dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    linear = ClassParallelLoss(mlkernels.ArcFaceLoss(), WIDTH, CLASSES, normalize=True)
    linear(x, target).backward()
    dist.barrier()
    linear.communication()
    before = bytes_sent()
    linear(x, target).backward()
    dist.barrier()  # what is still in a buffer has not been sent
    sent, counted = bytes_sent() - before, sum(linear.communication().bytes.values())
    assert counted == promised(ranks, 3)
    assert counted <= sent <= 1.05 * counted, (counted, sent)

    logits = torch.randn(4096, 4, generator=generator, requires_grad=True)
    label = torch.arange(4096) % (4 * ranks)
    communication()
    dist.barrier()
    before = bytes_sent()
    class_parallel_softmax_loss(logits, label, num_classes=4 * ranks).backward()
    dist.barrier()
    sent, counted = bytes_sent() - before, sum(communication().bytes.values())
    assert counted == (ranks - 1) * (32 + 4 * 3 * 4096)
    assert counted <= sent <= 1.05 * counted, (counted, sent)
    dist.barrier()


linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what was sent")
