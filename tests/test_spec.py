"""What a loss is, apart from how it is computed."""

import dataclasses
import math
import pickle

import pytest
import torch
from table import LOSSES

import mlkernels
from mlkernels.checks import check_number
from mlkernels.numbering import (
    SLOTS,
    TRAINABLE,
    BeyondPi,
    Clamp,
    HeadKind,
    MarginGradient,
    ScaleKind,
    Slot,
    TransformKind,
)
from mlkernels.spec import Spec, compose, option, spec


def structures():
    for transform in TransformKind:
        for scale in ScaleKind:
            for head in HeadKind:
                yield transform, scale, head


def test_one_object_per_structure():
    for kinds in structures():
        assert spec(*kinds) is spec(*kinds)
    assert spec(beyond_pi="easy") is not spec()
    assert spec(TransformKind.MARGIN, beyond_pi="easy").ids.beyond_pi == BeyondPi.EASY


def test_equal_and_hashable():
    alike = Spec(spec().ids, "cross_entropy")  # in other words
    assert alike == spec()
    assert hash(alike) == hash(spec())
    assert spec(head=HeadKind.TAU) != spec()
    assert len({spec(*kinds) for kinds in structures()}) == 40
    assert pickle.loads(pickle.dumps(spec(head=HeadKind.TAU, clamp="cross_entropy"))) == spec(
        head=HeadKind.TAU, clamp="cross_entropy"
    )


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec().ids = spec(head=HeadKind.TAU).ids
    with pytest.raises(dataclasses.FrozenInstanceError):
        mlkernels.Margin().m1 = 2.0


def test_classes_of_the_users_own():
    """What their constructors take is theirs to say; the dataclasses among them take the fields."""

    class Degrees(mlkernels.Margin):
        def __init__(self, degrees, *, easy=False):
            super().__init__(m2=math.radians(degrees), beyond_pi="easy" if easy else None)

    @dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
    class Named(mlkernels.Margin):
        name: str = ""

    x, y = torch.eye(3), torch.tensor([0, 1, 0])
    wanted = mlkernels.arcface_loss(x, y, margin=0.5, scale=2.0, beyond_pi="easy")
    for own in (Degrees(math.degrees(0.5), easy=True), Named(m2=0.5, beyond_pi="easy", name="arcface")):
        assert torch.equal(mlkernels.softmax_loss(x, y, transform=own, scale=2.0), wanted)
    with pytest.raises(TypeError, match=r"__init__\(\) got an unexpected keyword argument 'radians'"):
        Degrees(radians=0.5)
    with pytest.raises(TypeError, match=r"Named\(\) takes no 'margin'; there are m1, .*name"):
        Named(margin=0.5)


def test_printable():
    """A structure reads as what it does, with the names under which its numbers are passed."""
    assert repr(spec(head=HeadKind.TRUNCATED)) == (
        "Spec(transform=IDENTITY, row scale=SINGLE, head=TRUNCATED, beyond_pi=AUTO, gradient of a margin=EXACT, "
        "clamp=MIN; scale, k)"
    )
    assert len({repr(spec(*kinds)) for kinds in structures()}) == 40
    text = repr(
        spec(TransformKind.MARGIN, ScaleKind.TWO_SCALE, HeadKind.TAU, "easy", "straight_through", "cross_entropy")
    )
    for word in ("MARGIN", "m1", "m2", "m3", "norm", "beyond_pi=EASY", "STRAIGHT_THROUGH", "TWO_SCALE",
                 "scale_low", "scale_high", "eta", "TAU", "tau_slope", "clamp=CROSS_ENTROPY"):  # fmt: skip
        assert word in text


def test_slots_are_passed_in_the_order_of_transform_scale_head():
    for kinds in structures():
        found = spec(*kinds)
        slots = [slot for slot, _, _ in found.values]
        assert len(slots) == len(set(slots))
        assert all(0 <= slot < SLOTS for slot in slots)
        assert all(slot < Slot.WEIGHT for slot in slots)
        assert len(found.ids) == 6
        assert found.ids[:3] == kinds


def test_thresholds_and_options_are_not_trained():
    assert Slot.ETA not in TRAINABLE
    assert not TRAINABLE & {Slot.WEIGHT, Slot.ADJUSTMENT, Slot.GROUP, Slot.TAU_MIN, Slot.SMOOTHING, Slot.Z_LOSS}


# ---- options and numbers ---------------------------------------------------------------------------------------------


def test_options():
    assert option("beyond_pi", None, BeyondPi) is BeyondPi.AUTO
    for choices, names in (
        (BeyondPi, ["linear", "monotone", "easy", "none"]),
        (MarginGradient, ["exact", "straight_through"]),
        (Clamp, ["min", "cross_entropy"]),
    ):
        for name in names:
            assert option("an_option", name, choices).name == name.upper()
        for wrong in ("", "auto", "Auto ", 3, ("linear",)):
            with pytest.raises(ValueError, match="an_option must be one of") as caught:
                option("an_option", wrong, choices)
            assert repr(wrong) in str(caught.value)
            assert all(repr(name) in str(caught.value) for name in names)
            assert "auto'" not in str(caught.value).split("got")[0]
    with pytest.raises(ValueError, match="clamp"):
        option("clamp", None, Clamp)


@pytest.mark.parametrize("name", ["scale", "beta", "m1", "norm", "logit_norm", "softcap", "k", "tau_min"])
def test_positive_numbers(name):
    assert check_number(name, 1) == 1.0
    assert isinstance(check_number(name, 1), float)
    for wrong in (0, 0.0, -1e-300, float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=name):
            check_number(name, wrong)


@pytest.mark.parametrize("name", ["gamma", "alpha", "kappa", "z_loss", "label_smoothing"])
def test_numbers_that_may_be_0(name):
    assert check_number(name, 0) == 0.0
    for wrong in (-1e-300, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=name):
            check_number(name, wrong)


def test_thresholds_may_be_infinite():
    """eta = inf: every row at the low scale."""
    assert check_number("eta", float("inf")) == float("inf")
    with pytest.raises(ValueError, match="eta"):
        check_number("eta", float("nan"))
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    low = mlkernels.two_scale_cross_entropy(x, y, 2.0, 7.0, eta=float("inf"))
    torch.testing.assert_close(low, torch.nn.functional.cross_entropy(2 * x, y))
    high = mlkernels.two_scale_cross_entropy(x, y, 2.0, 7.0, eta=-float("inf"))
    torch.testing.assert_close(high, torch.nn.functional.cross_entropy(7 * x, y))


@pytest.mark.parametrize("wrong", ["1", None, [1.0], 1j, True, object()], ids=lambda value: type(value).__name__)
def test_numbers_are_numbers(wrong):
    with pytest.raises(TypeError, match="scale"):
        check_number("scale", wrong)


def test_compositions_by_structure():
    structure, values = compose(mlkernels.Margin(m2=0.5), mlkernels.TwoScale(1.0, 2.0), mlkernels.Modulated(), None)
    assert structure is spec(TransformKind.MARGIN, ScaleKind.TWO_SCALE, HeadKind.MODULATED)
    assert len(values) == len(structure.values)
    named = dict(zip((name for _, name, _ in structure.values), values, strict=True))
    assert named["m2"] == 0.5
    assert named["scale_high"] == 2.0
    assert named["beta"] == 4.0
    for loss in LOSSES:
        parts = {"transform": None, "scale": 1.0, "head": None, "target_logit": None} | loss.compose(loss.params | {
            name: torch.tensor(value) for name, value in loss.params.items() if isinstance(value, tuple)
        } | {name: torch.ones(2, 1) for name in ("target_logit",) if name in loss.params})  # fmt: skip
        structure, values = compose(parts["transform"], parts["scale"], parts["head"], parts["target_logit"])
        assert len(values) == len(structure.values), loss
        for kind, field in (
            (TransformKind, "transform"), (ScaleKind, "row_scale"), (HeadKind, "head"),
            (BeyondPi, "beyond_pi"), (MarginGradient, "margin_gradient"), (Clamp, "clamp"),
        ):  # fmt: skip
            own = {"row_scale": "scale", "margin_gradient": "gradient"}.get(field, field)
            assert kind(getattr(structure.ids, field)).name.lower() == (getattr(loss.structure, own) or "auto"), loss


def test_changing_a_number_builds_no_structure(monkeypatch):
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    mlkernels.softmax_loss(x, y, head=mlkernels.Modulated(gamma=2.0))

    def build(self):
        raise AssertionError("a Spec was built")

    monkeypatch.setattr(Spec, "__post_init__", build)
    for gamma in (2.5, 3.0, torch.tensor(4.0)):
        mlkernels.softmax_loss(x, y, head=mlkernels.Modulated(gamma=gamma))


def test_public_names():
    functions = (
        "cross_entropy focal_loss modulated_cross_entropy margin_cross_entropy arcface_loss cosface_loss "
        "sphereface_loss two_scale_cross_entropy piecewise_cross_entropy softmax_loss multi_margin_loss center_loss"
    )
    types = "Margin Affine PiecewiseLinear TwoScale Modulated Tau Truncated RowStats"
    for name in f"{functions} {types} available_backends check_labels".split():
        assert hasattr(mlkernels, name), name
    assert set(mlkernels.available_backends()) == {"reference", "cpu", "triton", "cuda"}
    assert mlkernels.available_backends()["reference"] is None
