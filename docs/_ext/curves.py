"""What each loss does to one row, computed by the library itself: the loss and its gradient, side by side.

A page has ``<!-- curve: focal -->`` where the site shows a picture. README's is written by
``python docs/_ext/curves.py FILE``.
"""

import io
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import mlkernels
from bench import charts, report

INK = "#010203"  # becomes the text's color, in the light and in the dark
COLORS = ["#2f7ed8", "#e0752d", "#3a9f5b", "#b04fc4", "#8a8f98"]
POINTS = 121


class Curves(NamedTuple):
    """A loss of several parameters along one quantity of a row."""

    x: str
    points: Tensor
    rows: Callable[[Tensor], Tensor]  # the logits (or features) of a row at each point; class 0 is the label's
    gradient: str
    losses: dict[str, Callable[..., Tensor]]
    derivative: Callable[[Tensor, Tensor], Tensor] = lambda gradient, points: -gradient[:, 0]
    limits: tuple[float, float] | None = None  # of the gradient's panel

    def of(self, loss: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """The loss and the derivative at every point."""
        rows = self.rows(self.points).requires_grad_()
        found = loss(rows, torch.zeros(len(rows), dtype=torch.long))
        (gradient,) = torch.autograd.grad(found.sum(), rows)
        return found.detach(), self.derivative(gradient, self.points)


def _by(function: Callable[..., Tensor], **parameters: object) -> Callable[..., Tensor]:
    return lambda rows, target: function(rows, target, reduction="none", **parameters)


def _of_probability(p: Tensor) -> Tensor:
    """Two classes, of which the label's has probability p."""
    return torch.stack([p.logit(), torch.zeros_like(p)], 1)


def _weight(gradient: Tensor, p: Tensor) -> Tensor:
    """w = -dL/d log p: dL/dz_y is -w (1 - p)."""
    return -gradient[:, 0] / (1 - p)


def _of_angle(degrees: Tensor) -> Tensor:
    """Cosines: the label's class at the angle, nine others at 90 degrees."""
    return torch.cat([torch.deg2rad(degrees).cos().unsqueeze(1), torch.zeros(len(degrees), 9)], 1)


def _of_difference(difference: Tensor) -> Tensor:
    return torch.stack([difference, torch.zeros_like(difference)], 1)


_p = torch.linspace(0.002, 0.998, POINTS, dtype=torch.float64)
_angle = torch.linspace(0.0, 180.0, POINTS, dtype=torch.float64)
_delta = torch.linspace(-4.0, 4.0, POINTS, dtype=torch.float64)


def _along_p(losses: dict[str, Callable[..., Tensor]], limits: tuple[float, float] | None = None) -> Curves:
    x = "probability p of the label's class"
    return Curves(x, _p, _of_probability, "weight w = −dL/d log p", losses, _weight, limits)


def _along_angle(losses: dict[str, Callable[..., Tensor]], limits: tuple[float, float] | None = None) -> Curves:
    x = "angle θ to the label's class, degrees"
    return Curves(x, _angle, _of_angle, "−dL/d cos θ", losses, limits=limits)


def _along_difference(losses: dict[str, Callable[..., Tensor]]) -> Curves:
    return Curves("δ = logit of the label's class − the other's", _delta, _of_difference, "−dL/dδ", losses)


def _along_feature(x: str, losses: dict[str, Callable[..., Tensor]]) -> Curves:
    return Curves(x, _delta, lambda x: x.unsqueeze(1), "dL/dx", losses, lambda gradient, x: gradient[:, 0])


def _tables(points: list[float]) -> dict[str, Tensor]:
    """Pieces that join the points, as slopes and biases."""
    ends = torch.tensor(points, dtype=torch.float64)
    slope = (ends[1:] - ends[:-1]) * (len(points) - 1)
    return {"tau_slope": slope, "tau_bias": ends[:-1] - slope * torch.linspace(0, 1, len(points))[:-1]}


def _center(rows: Tensor, target: Tensor) -> Tensor:
    return mlkernels.center_loss(rows, target, torch.zeros(1, 1, dtype=rows.dtype), reduction="none")


def _lgm(alpha: float, lambda_: float) -> Callable[..., Tensor]:
    means = torch.tensor([[0.0], [4.0]], dtype=torch.float64)
    return lambda rows, target: mlkernels.lgm_loss(rows, target, means, alpha=alpha, lambda_=lambda_, reduction="none")


_cross_entropy = _by(mlkernels.cross_entropy)


def _poly1(rows: Tensor, target: Tensor) -> Tensor:
    nll = _cross_entropy(rows, target)
    return nll - 2.0 * torch.expm1(-nll)


def _scales(eta: float) -> Callable[..., Tensor]:
    return lambda rows, target: mlkernels.two_scale_cross_entropy(rows, target, 0.5, 5.0, eta=eta, reduction="none")


_modulated = partial(_by, mlkernels.modulated_cross_entropy)
_piecewise = partial(_by, mlkernels.piecewise_cross_entropy)
_margin = partial(_by, scale=16.0)

CURVES = {
    "cross_entropy": _along_difference(
        {
            "scale .5": _by(mlkernels.cross_entropy, scale=0.5),
            "scale 1": _cross_entropy,
            "scale 2": _by(mlkernels.cross_entropy, scale=2.0),
            "smoothing .1": _by(mlkernels.cross_entropy, label_smoothing=0.1),
        }
    ),
    "focal": _along_p({f"γ = {gamma:g}": _by(mlkernels.focal_loss, gamma=gamma) for gamma in (0.0, 0.5, 2.0, 5.0)}),
    "modulated": _along_p(
        {
            "cross entropy": _cross_entropy,
            "β = 4, γ = 5": _modulated(beta=4.0, gamma=5.0),
            "β = 4, γ = 10": _modulated(beta=4.0, gamma=10.0),
            "focal, γ = 2": _modulated(beta=1.0, gamma=2.0),
            "generalised, q = .7": _modulated(beta=0.7, gamma=1.0, alpha=1 / 0.7, kappa=0.0),
        }
    ),
    "margins": _along_angle(
        {
            "no margin": _margin(mlkernels.cross_entropy),
            "ArcFace .5": _margin(mlkernels.arcface_loss, margin=0.5),
            "CosFace .35": _margin(mlkernels.cosface_loss, margin=0.35),
            "SphereFace 2": _margin(mlkernels.sphereface_loss, margin=2.0),
        }
    ),
    "beyond_pi": _along_angle(
        {
            f'"{name}"': _margin(mlkernels.arcface_loss, margin=0.8, beyond_pi=name)
            for name in ("linear", "monotone", "easy", "none")
        },
        limits=(-40, 60),
    ),
    "two_scale": _along_difference(
        {
            "one scale": _by(mlkernels.cross_entropy, scale=0.5),
            "two, η = .01": _scales(0.01),
            "two, η = 1": _scales(1.0),
        }
    ),
    "piecewise": _along_p(
        {
            "identity": _piecewise(**_tables([0, 0.25, 0.5, 0.75, 1])),
            "hard rows matter less": _piecewise(**_tables([0.2, 0.35, 0.5, 0.75, 1])),
            "easy rows matter less": _piecewise(**_tables([0, 0.3, 0.7, 0.95, 1])),
        },
        limits=(-0.1, 2.5),
    ),
    "multi_margin": _along_difference({f"p = {p}": _by(mlkernels.multi_margin_loss, p=p) for p in (1, 2)}),
    "center": _along_feature("x − c, of one feature", {"½(x − c)²": _center}),
    "lgm": _along_feature(
        "x, of one feature: the own mean is 0, the other's 4",
        {f"α = {alpha:g}, λ = {lambda_:g}": _lgm(alpha, lambda_) for alpha, lambda_ in ((0, 0), (0.3, 0), (0.3, 0.1))},
    ),
    "own": _along_p(
        {
            "cross entropy": _cross_entropy,
            "poly-1, ε = 2": _poly1,
            "truncated at .1": _by(mlkernels.softmax_loss, head=mlkernels.Truncated(0.1)),
        }
    ),
}


def svg_of(drawn: Figure) -> str:
    """The figure without what a page does not need: metadata, families of fonts, digits that nobody sees."""
    file = io.StringIO()
    drawn.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", svg[svg.index("<svg") :])
    svg = re.sub(r"\d+\.\d\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), svg)
    return re.sub(r"\s*\n\s*", " ", svg) + "\n"


def style(name: str, ink: str) -> Any:
    """What all pictures have in common; words stay words."""
    inked = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    return rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, **inked})


def figure(name: str, ink: str = INK, width: float = 8.2) -> str:
    """The picture as SVG."""
    curves = CURVES[name]
    with style(name, ink):
        drawn = Figure(figsize=(width, 2.9), layout="constrained")
        FigureCanvasSVG(drawn)
        left, right = drawn.subplots(1, 2)
        for k, (label, loss) in enumerate(curves.losses.items()):
            line = {"color": COLORS[k], "label": label, "linewidth": 1.8}
            for axes, values in zip((left, right), curves.of(loss), strict=True):
                axes.plot(curves.points, values, **line)
        for axes, title in ((left, "loss L"), (right, curves.gradient)):
            ends = round(curves.points[0].item()), round(curves.points[-1].item())
            axes.set(xlabel=curves.x, title=title, xlim=ends)
            axes.title.set_size(10)
            axes.grid(alpha=0.18, color=ink)
            axes.spines[["top", "right"]].set_visible(False)
        if curves.points is _p:
            left.set_ylim(-0.1, 4)
        if curves.limits is not None:
            right.set_ylim(*curves.limits)
        if curves.points is _angle:
            left.set_xticks(range(0, 181, 45))
            right.set_xticks(range(0, 181, 45))
        handles, labels = left.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        return svg_of(drawn)


def inline(svg: str, words: str) -> str:
    """The picture as a part of a page: it has the page's text color and, on a phone, a width that can be read."""
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg.replace(INK, "currentColor"), count=2)
    return f'<figure class="curve" role="img" aria-label="{words}">{svg}</figure>'


def chart(name: str) -> str:
    """The pictures of one result of the benchmark."""
    with style(name, INK):
        drawn = charts.figure(report.load(report.FOLDER / f"{name}.json"))
        return inline(svg_of(drawn), "bandwidth reached, and time against classes")


def _insert(app: object, docname: str, source: list[str]) -> None:
    def shown(match: re.Match[str]) -> str:
        words = f"loss and gradient: {', '.join(CURVES[match[1]].losses)}"
        return f"```{{raw}} html\n{inline(figure(match[1]), words)}\n```"

    def charted(match: re.Match[str]) -> str:
        return f"```{{raw}} html\n{chart(match[1])}\n```"

    source[0] = re.sub(r"<!-- curve: (\w+) -->", shown, source[0])
    source[0] = re.sub(r"<!-- chart: ([\w-]+) -->", charted, source[0])


def setup(app):
    app.connect("source-read", _insert)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(figure("modulated", ink="#808080"))
