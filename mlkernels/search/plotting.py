"""The picture of a search."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_T, _TAU, _WEIGHT, _PLAIN = "C0", "C3", "C4", "0.6"
_WINNER: dict[str, Any] = {"color": "0.25", "linewidth": 1, "linestyle": (0, (4, 2))}


def plot(record: Record, path: str | PathLike[str] | None = None) -> Figure:
    r"""The found t and tau, what they make of samples, the rewards, and how far :math:`\mu` has gone.

    Above: t, :math:`\tau`, and the weight :math:`p\,\tau'(p)/\tau(p)` by which :math:`\tau` multiplies the gradient of
    cross entropy; of :math:`\mu` after the last epoch, paler of earlier ones, of the last winner (dashed) and of the
    identity (grey). Below: the rewards, with those far below the others and of failed candidates as crosses at the
    bottom; slopes and biases of :math:`\mu`, one line per piece.

    Args:
        record: of at least one epoch.
        path: a file to write, of any kind that matplotlib writes; None: none.

    Raises:
        ValueError: no epoch has been done.
        ImportError: matplotlib is missing.

    Example:
        >>> from mlkernels.search import LossSearch, plot
        >>> search = LossSearch(candidates=4)
        >>> _ = search.update(search.sample(), [0.1, 0.3, 0.2, 0.3])
        >>> figure = plot(search.record)  # doctest: +SKIP
    """
    if not record.rounds:
        raise ValueError("record must have at least one epoch, got one with none")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(13, 7.4), layout="constrained")
    figure.suptitle(
        f"loss search over {len(record.rounds)} epochs: M = {record.pieces}, B = {record.candidates}, "
        f"σ = {record.sigma:g}, learning rate {record.lr:g}"
    )
    upper, lower = figure.subplots(2, 3)
    _curves(upper[0], record, 0, _T)
    upper[0].set(title="t", xlabel="logit of the target, x", ylabel="t(x)")
    _curves(upper[1], record, 2, _TAU)
    upper[1].set(title="τ", xlabel="probability of the target, p", ylabel="τ(p)")
    _weights(upper[2], record)
    upper[2].set(title="weight in the gradient", xlabel="probability of the target, p", ylabel="p τ′(p) / τ(p)")
    _rewards(lower[0], record)
    _drift(lower[1], record.mu, 0, "slopes of μ", "a")
    _drift(lower[2], record.mu, 1, "biases of μ", "b")
    for axes in lower:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (*upper, *lower):
        axes.legend(frameon=False, fontsize="small")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.03)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _pieces(pieces: int, low: float, high: float) -> Tensor:
    """(M, 201) points, those of each bin in a row, both of its ends among them."""
    edges = torch.linspace(low, high, pieces + 1, dtype=torch.float64)
    return torch.lerp(edges[:-1, None], edges[1:, None], torch.linspace(0, 1, 201, dtype=torch.float64))


def _broken(axes: Axes, x: Tensor, y: Tensor, **style: Any) -> None:
    """A curve of pieces: a gap at every jump."""
    gap = torch.full((len(x), 1), torch.nan, dtype=x.dtype)
    axes.plot(torch.cat([x, gap], 1).flatten().numpy(), torch.cat([y, gap], 1).flatten().numpy(), **style)


def _shown(record: Record, colour: str) -> list[tuple[Tensor, dict[str, Any]]]:
    """(4, M) of at most four epochs before the last, paler the earlier, of the last, and of its winner; with styles."""
    mu, last, epochs = record.mu, record.rounds[-1], len(record.rounds)
    earlier = sorted({round(epochs * share) for share in (0.2, 0.4, 0.6, 0.8)} - {0, epochs})
    return [
        *((mu[epoch], {"color": colour, "alpha": 0.1 + 0.35 * epoch / epochs}) for epoch in earlier),
        (mu[-1], {"color": colour, "linewidth": 2.2, "label": "found (μ)"}),
        (last.theta[last.best], {**_WINNER, "label": "last winner"}),
    ]


def _curves(axes: Axes, record: Record, row: int, colour: str) -> None:
    low, high = (-1.0, 1.0) if row == 0 else (0.0, 1.0)
    x = _pieces(record.pieces, low, high)
    axes.plot([low, high], [low, high], color=_PLAIN, linewidth=1, label="identity")
    for theta, style in _shown(record, colour):
        _broken(axes, x, theta[row, :, None] * x + theta[row + 1, :, None], **style)


def _weights(axes: Axes, record: Record) -> None:
    x = _pieces(record.pieces, 0.0, 1.0)
    axes.axhline(1, color=_PLAIN, linewidth=1, label="cross entropy")
    for theta, style in _shown(record, _WEIGHT):
        slope, bias = theta[2, :, None], theta[3, :, None]
        tau = slope * x + bias
        weight = slope * x / tau
        clamped = (tau <= record.tau_min) & ~((bias == 0) & (slope > 0))
        # A line from the clamped part to the other would be drawn where there is none.
        edge = clamped != clamped.roll(1, 1)
        edge[:, 0] = False
        weight = torch.where(clamped, 0.0 if record.clamp == "min" else 1.0, weight)
        _broken(axes, x, weight.where(~edge, torch.nan), **style)
    axes.set_ylim(-0.6, 3.1)  # it grows without bound where tau goes to 0


def _rewards(axes: Axes, record: Record) -> None:
    rewards = record.rewards
    epochs = torch.arange(1, len(rewards) + 1)
    finite = rewards.isfinite()
    mean = rewards.where(finite, 0.0).sum(1) / finite.sum(1)
    x = epochs[:, None].expand_as(rewards)
    axes.scatter(
        x[finite].numpy(), rewards[finite].numpy(), s=9, alpha=0.35, color="C7", linewidths=0, label="candidates"
    )
    axes.plot(epochs.numpy(), mean.numpy(), color="C2", label="mean")
    best = rewards[torch.arange(len(rewards)), record.best]
    axes.plot(epochs.numpy(), best.numpy(), color="C1", marker="o", markersize=3, label="winner")
    axes.set(title="rewards", xlabel="epoch", ylabel="reward")
    # A candidate that all but failed would press the others into one line; those below are at the lower edge.
    kept = rewards[finite]
    low, high = kept.quantile(0.05).item(), kept.max().item()
    room = 0.06 * (high - low) or 0.01 * (abs(high) or 1.0)
    floor = max(low, kept.min().item()) - room
    axes.set_ylim(floor - room / 2, high + room)
    below = ~finite | (rewards < floor)
    if bool(below.any()):
        places = x[below].numpy(), torch.full_like(rewards[below], floor).numpy()
        axes.scatter(*places, s=14, marker="x", color="C3", linewidths=0.8, label="below, or failed", clip_on=False)


def _drift(axes: Axes, mu: Tensor, row: int, title: str, letter: str) -> None:
    epochs = range(len(mu))
    for colour, name, first in ((_T, "t", row), (_TAU, "τ", row + 2)):
        for piece in range(mu.shape[-1]):
            # Darker from the lowest bin to the highest.
            alpha = 0.35 + 0.65 * (piece + 1) / mu.shape[-1]
            (line,) = axes.plot(epochs, mu[:, first, piece].numpy(), color=colour, alpha=alpha, linewidth=1.3)
        line.set_label(f"{letter} of {name}, darker for higher bins")
    axes.set(title=title, xlabel="epochs done")
