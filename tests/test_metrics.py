"""The measures, against their definitions in loops."""

import math
import sys

import pytest
import torch
from test_no_sync import Forbid

import mlkernels
from mlkernels import metrics

N, C = 40, 5


def draw():
    logits = 2 * torch.randn(N, C, dtype=torch.float64)
    target = torch.randint(C, (N,))
    target[::7] = -100
    return logits, target


def kept(logits, target):
    return [(row, y) for row, y in zip(logits, target.tolist(), strict=True) if y != -100]


def forms(logits, target, **options):
    """Logits, and the statistics of a loss on them."""
    return logits, mlkernels.softmax_loss(logits.requires_grad_(), target, return_stats=True, **options)[1]


def test_accuracy():
    logits, target = draw()
    hits = [int(row.argmax()) == y for row, y in kept(logits, target)]
    for form in forms(logits, target):
        value = metrics.accuracy(form, target)
        assert (value.shape, value.requires_grad) == ((), False)
        assert value.item() == pytest.approx(sum(hits) / len(hits))
    assert 0 < sum(hits) < len(hits)


@pytest.mark.parametrize("n", [1, 2, 3, C, C + 1])
def test_top_n(n):
    logits, target = draw()
    hits = [int((row > row[y]).sum()) < n for row, y in kept(logits, target)]
    for form in forms(logits, target):
        assert metrics.top_n_accuracy(form, target, n=n).item() == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("a", [0.0, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("scale", [1.0, 0.2, 3.0])
def test_close_enough(a, scale):
    logits, target = draw()
    hits = []
    for row, y in kept(logits, target):
        p = torch.softmax(scale * row, 0)
        hits.append(bool(p[y] >= p.max() - a))
    for form in forms(logits, target, scale=scale):
        assert metrics.close_enough(form, target, a=a, scale=scale).item() == pytest.approx(sum(hits) / len(hits))
    tensor = metrics.close_enough(logits, target, a=a, scale=torch.tensor(scale))
    assert tensor.item() == pytest.approx(sum(hits) / len(hits))


def test_close_enough_by_the_statistics_of_a_two_scale_loss():
    logits, target = draw()
    low, high, norm = 1.5, 15.0, torch.tensor(2.0)
    rows = forms(logits, target, scale=mlkernels.TwoScale(low, high, eta=0.01, norm=norm))[1]
    for a in (0.0, 0.1, 0.4):
        wanted = metrics.close_enough(logits, target, a=a, scale=low / norm.item())
        assert metrics.close_enough(rows, target, a=a, scale=low / norm).item() == pytest.approx(wanted.item())


def test_close_enough_where_probabilities_underflow():
    logits = torch.tensor([[0.0, 500.0, 499.99], [0.0, 1000.0, 0.0]])
    target = torch.tensor([2, 0])
    for form in forms(logits, target):
        assert metrics.close_enough(form, target, a=0.1).item() == 0.5


def test_superclass_accuracy():
    logits, target = draw()
    superclass = torch.tensor([0, 0, 1, 1, 2], dtype=torch.int32)
    hits = [int(superclass[row.argmax()]) == int(superclass[y]) for row, y in kept(logits, target)]
    assert sum(hits) > metrics.accuracy(logits, target) * len(hits)
    for form in forms(logits, target):
        assert metrics.superclass_accuracy(form, target, superclass).item() == pytest.approx(sum(hits) / len(hits))


def test_confidence():
    logits, target = draw()
    margins = [float(row[y] - max(row[j] for j in range(C) if j != y)) for row, y in kept(logits, target)]
    mean = sum(margins) / len(margins)
    for form in forms(logits, target):
        assert metrics.classification_confidence(form, target).item() == pytest.approx(mean)
        big = torch.tensor(1e60, dtype=torch.float64)
        for norm in (1e60, big):
            assert metrics.classification_confidence(form, target, logit_norm=norm).item() == pytest.approx(
                mean / 1e60, rel=1e-9
            )
    single = metrics.classification_confidence(logits.detach().float(), target, logit_norm=1e60)
    assert single.item() == pytest.approx(mean / 1e60, rel=1e-5)


def test_images():
    logits, target = torch.randn(2, C, 3, 4), torch.randint(C, (2, 3, 4))
    flat, labels = logits.movedim(1, -1).reshape(-1, C), target.reshape(-1)
    for measure in (metrics.accuracy, metrics.top_n_accuracy, metrics.close_enough, metrics.classification_confidence):
        assert torch.equal(measure(logits, target), measure(flat, labels))
    assert metrics.macro_f1(logits, target) == metrics.macro_f1(flat, labels)


def test_macro_f1():
    logits, target = draw()
    pairs = [(int(row.argmax()), y) for row, y in kept(logits, target)]
    scores = []
    for c in range(C):
        true = sum(p == c == y for p, y in pairs)
        predicted, there = sum(p == c for p, _ in pairs), sum(y == c for _, y in pairs)
        scores.append(2 * true / (predicted + there))
    for form in (*forms(logits, target), logits.argmax(1)):
        value = metrics.macro_f1(form, target)
        assert isinstance(value, float)
        assert value == pytest.approx(sum(scores) / C)


def test_nmi():
    logits, target = draw()
    pairs = [(int(row.argmax()), y) for row, y in kept(logits, target)]
    n = len(pairs)

    def entropy(of):
        counts = [sum(pick == v for pick in of) for v in set(of)]
        return -sum(k / n * math.log(k / n) for k in counts)

    first, second = [p for p, _ in pairs], [y for _, y in pairs]
    mutual = entropy(first) + entropy(second) - entropy(pairs)
    wanted = 2 * mutual / (entropy(first) + entropy(second))
    for form in (*forms(logits, target), logits.argmax(1) + 7):
        assert metrics.nmi(form, target) == pytest.approx(wanted)
    assert metrics.nmi(target * 3, target) == pytest.approx(1.0)


ALL = [
    metrics.accuracy,
    metrics.top_n_accuracy,
    metrics.close_enough,
    lambda x, y: metrics.superclass_accuracy(x, y, torch.arange(C)),
    metrics.classification_confidence,
    metrics.macro_f1,
    metrics.nmi,
]


@pytest.mark.parametrize("measure", ALL)
def test_no_rows_is_nan(measure):
    assert math.isnan(float(measure(torch.randn(3, C), torch.full((3,), -100))))
    assert math.isnan(float(measure(torch.zeros(0, C), torch.zeros(0, dtype=torch.long))))


@pytest.mark.parametrize("measure", ALL[:4])
@pytest.mark.parametrize("where", [0, 2])
def test_a_nan_counts_as_wrong(measure, where):
    """And is no ignored row, although its prediction is -1 too."""
    logits = 4 * torch.eye(C)[:3]
    logits[0, where] = math.nan
    for form in forms(logits, torch.arange(3)):
        assert float(measure(form, torch.arange(3))) == pytest.approx(2 / 3)


def test_a_nan_counts_as_wrong_in_f1():
    logits = 4 * torch.eye(2).repeat(2, 1)
    logits[0, 0] = math.nan
    assert metrics.macro_f1(logits, torch.tensor([0, 1, 0, 1])) == pytest.approx((2 / 3 + 1) / 2)


def test_another_ignore_index():
    logits, target = torch.eye(3), torch.tensor([0, 2, 2])
    assert metrics.accuracy(logits, target, ignore_index=0).item() == 0.5
    assert metrics.superclass_accuracy(logits, target, torch.tensor([0, 1, 1]), ignore_index=0).item() == 1.0
    assert metrics.classification_confidence(logits, target, ignore_index=2).item() == 1.0
    assert metrics.macro_f1(logits, target, ignore_index=2) == 1.0


def test_no_synchronisation_by_statistics():
    """Of logits the CPU checks the labels, which a GPU does not."""
    logits, target = draw()
    rows = forms(logits, target)[1]
    with Forbid():
        for measure in (
            metrics.accuracy,
            metrics.top_n_accuracy,
            metrics.close_enough,
            metrics.classification_confidence,
        ):
            measure(rows, target)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    for measure in (metrics.macro_f1, metrics.nmi):
        with pytest.raises(ImportError, match="pip install scikit-learn"):
            measure(torch.eye(2), torch.tensor([0, 1]))


RUNNING = [
    (metrics.accuracy, {}),
    (metrics.top_n_accuracy, {"n": 2}),
    (metrics.close_enough, {"a": 0.2, "scale": 0.5}),
    (metrics.superclass_accuracy, {"superclass": torch.tensor([0, 1, 1, 0])}),
    (metrics.classification_confidence, {"logit_norm": 3.0}),
    (metrics.macro_f1, {}),
    (metrics.nmi, {}),
]


@pytest.mark.parametrize(("measure", "options"), RUNNING, ids=lambda value: getattr(value, "__name__", ""))
def test_running_is_the_measure_of_all_rows_at_once(measure, options):
    """Batches of different sizes, one of them ignored whole, logits and statistics in turn."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(23, 4, generator=generator)
    target = torch.randint(0, 4, (23,), generator=generator)
    target[[2, 9, 10, 11]] = 7
    running = metrics.Running(measure, **options, ignore_index=7)
    assert math.isnan(running.compute())
    parts = list(zip(logits.split([9, 3, 11]), target.split([9, 3, 11]), strict=True))
    for _ in range(2):
        for i, (x, y) in enumerate(parts):
            scale = options.get("scale", 1.0)
            rows = forms(x, torch.where(y == 7, -100, y), scale=scale)[1] if i == 2 else x
            running.update(rows, y)
        wanted = float(measure(logits, target, **options, ignore_index=7))
        assert float(running.compute()) == pytest.approx(wanted, rel=1e-6)
        assert not math.isnan(wanted)
        running.reset()
    assert math.isnan(running.compute())
    assert repr(running).startswith(f"Running({measure.__name__}") and "ignore_index=7" in repr(running)


def test_running_takes_the_measures_of_the_module():
    with pytest.raises(TypeError, match=r"measure takes a function of mlkernels\.metrics, got <function"):
        metrics.Running(lambda x, y: 0.0)
    with pytest.raises(TypeError, match=r"top_n_accuracy\(\) takes no 'm'; there are n, ignore_index"):
        metrics.Running(metrics.top_n_accuracy, m=2)


def test_compiled():
    """In one graph, from logits."""
    input, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, -100, 0])
    compiled = torch.compile(metrics.accuracy, fullgraph=True, backend="eager")
    assert torch.equal(compiled(input, target), metrics.accuracy(input, target))
