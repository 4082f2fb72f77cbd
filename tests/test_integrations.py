"""The package in a plain loop, in Lightning and in Hugging Face's Trainer: with those libraries where they are."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mlkernels
from mlkernels import data

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs
FOLDER = Path(__file__).parent.parent / "examples" / "integrations"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"integration_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ---- a plain loop ----------------------------------------------------------------------------------------------------


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("plain_loop").main(6) > 0.93
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    scales = [float(line.rsplit("R1 ", 1)[1].split(",")[0]) for line in lines]
    assert len(set(scales)) > 1, "R1 is trained"


def test_plain_loop_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = script("plain_loop")
    whole = loop.main(4)
    expected = capsys.readouterr().out.splitlines()[-1]
    loop.main(2, tmp_path / "run.pt")
    capsys.readouterr()
    assert loop.main(4, tmp_path / "run.pt") == whole
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[-1] == expected


# ---- Lightning -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning_example() -> ModuleType:
    pytest.importorskip("lightning", reason="needs the extra integrations")
    return script("lightning_module")


def test_lightning(lightning_example: ModuleType, tmp_path: Path) -> None:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_time": "00:00:01:00"}
    start = lightning_example.Classifier()
    module, accuracy = lightning_example.main(6, **quiet, **options)
    assert accuracy > 0.93
    margin, center = module.loss.losses
    assert margin.scale.item() != 16.0, "the scale is trained"
    assert not torch.equal(center.centers, start.loss.losses[1].centers), "centers move"

    (checkpoint,) = tmp_path.rglob("*.ckpt")
    again = lightning_example.Classifier.load_from_checkpoint(checkpoint, map_location="cpu")
    assert torch.equal(again.loss.losses[0].scale, margin.scale)
    assert torch.equal(again.loss.losses[1].centers, center.centers)
    images = data.digits().test_images
    torch.testing.assert_close(again.eval()(images), module.eval()(images))


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hugging_face() -> ModuleType:
    pytest.importorskip("transformers", reason="needs the extra integrations")
    pytest.importorskip("accelerate", reason="needs the extra integrations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return script("hugging_face")


def test_trainer(hugging_face: ModuleType) -> None:
    model, accuracy = hugging_face.main(6, use_cpu=True)
    assert accuracy > 0.93
    assert (model.loss.scale_low.item(), model.loss.scale_high.item()) != (1.0, 10.0), "the scales are trained"


def test_trainer_accumulates_as_one_batch(hugging_face: ModuleType) -> None:
    """Four batches of 16 are one of 64: that is what num_items_in_batch is for."""

    def weights(batch: int, accumulated: int) -> list[torch.Tensor]:
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        # SGD without clipping: Adam and clipped gradients would not notice a factor.
        plain = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
        model, _ = hugging_face.main(1, use_cpu=True, max_steps=4, **plain, **sizes)
        return [p.detach() for p in model.parameters()]

    whole, parts = weights(64, 1), weights(16, 4)
    start = [p.detach() for p in (torch.manual_seed(0), hugging_face.Classifier())[1].parameters()]
    assert not torch.allclose(whole[0], start[0], atol=1e-3)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_language_model(hugging_face: ModuleType) -> None:
    """Cross entropy by the model itself, with ignored labels and with the count that Trainer hands over."""
    import transformers

    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    input = torch.randint(40, (3, 9))
    labels = input.clone()
    labels[0, 5:], labels[1, :2] = -100, -100
    compute = hugging_face.causal_language_model(mlkernels.CrossEntropyLoss(reduction="sum"))
    outputs = model(input_ids=input)
    for count in (None, torch.tensor(50)):
        options = {} if count is None else {"num_items_in_batch": count}
        wanted = model(input_ids=input, labels=labels, **options).loss
        torch.testing.assert_close(compute(outputs, labels, **options), wanted)
    wanted = model.transformer.wte.weight
    gradients = [
        torch.autograd.grad(value, wanted)[0]
        for value in (compute(model(input_ids=input), labels), model(input_ids=input, labels=labels).loss)
    ]
    torch.testing.assert_close(*gradients)


def test_trainer_of_a_language_model(hugging_face: ModuleType, tmp_path: Path) -> None:
    """A sequence that repeats is learnt, by the modulated loss."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=12, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(12).roll(k) for k in range(12))]
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=60, learning_rate=1e-2, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=rows,
        compute_loss_func=hugging_face.causal_language_model(mlkernels.ModulatedCrossEntropyLoss(reduction="sum")),
    )  # fmt: skip
    trainer.train()
    input = torch.stack([row["input_ids"] for row in rows])
    predicted = model.eval()(input_ids=input).logits[:, :-1].argmax(2)
    assert (predicted == input[:, 1:]).float().mean() > 0.95
