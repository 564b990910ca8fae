"""Losses, weights of classes, and training a part of the model: what moves, what stays, what is refused."""

import csv

import numpy as np
import pytest
import timm
import torch
from foveal import train
from foveal.weights import WeightsError, load
from foveal.zoo.data.loader import PADDING, EpochSampler
from foveal.zoo.inference.source import open_model
from foveal.zoo.tasks.export import export_run
from foveal.zoo.tasks.losses import ClassLoss, balanced_weights, check_loss
from foveal.zoo.tasks.lr_find import LearningRateFinder, suggest
from foveal.zoo.tasks.tuning import check_tuning, freeze_statistics, merge_lora, set_trainable, tune
from torch.nn import functional as F
from train_helpers import configure

SHORT = (
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=2",
    "callbacks.ema=null",
    "logger=none",
    "task.scheduler=null",
)


def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5).eval()


def logits_and_targets():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    return logits, torch.tensor([0, 1, 2, 3, PADDING, 1, 0])


def by_hand(name: str, logits, targets, weights, smoothing, gamma):
    """The formulas, one image at a time."""
    total = norm = 0.0
    for row, target in zip(logits, targets.tolist(), strict=True):
        if target == PADDING:
            continue
        p, onehot = row.softmax(0), torch.full_like(row, smoothing / 4)
        onehot[target] += 1 - smoothing
        if name == "bce":
            s = row.sigmoid()
            total = total - (weights * (onehot * s.log() + (1 - onehot) * (1 - s).log())).mean()
            norm += 1
        else:
            factor = (1 - p) ** (gamma if name == "focal" else 0)
            total = total - (weights * onehot * factor * p.log()).sum()
            norm = norm + ((weights * onehot).sum() if name == "focal" else weights[target])
    return total / norm


@pytest.mark.parametrize("name", ["ce", "bce", "focal"])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_their_formulas(name, weighted):
    logits, targets = logits_and_targets()
    weights = [0.5, 1.0, 2.0, 0.25] if weighted else [1.0] * 4
    loss = ClassLoss(name, 4, gamma=1.5, weights=weights, smoothing=0.2).double()
    torch.testing.assert_close(
        loss(logits, targets), by_hand(name, logits, targets, torch.tensor(weights, dtype=torch.float64), 0.2, 1.5)
    )
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits)
    plain = ClassLoss(name, 4, gamma=1.5).double()
    torch.testing.assert_close(loss(logits, targets, plain=True), plain(logits, targets))
    kept = targets != PADDING
    soft = F.one_hot(targets[kept], 4).double()
    torch.testing.assert_close(plain(logits[kept], soft), plain(logits, targets))


def test_weights_of_classes():
    assert balanced_weights([1, 3, 0]) == [2.0, 2 / 3, 0.0]
    with pytest.raises(ValueError, match=r"task.loss='foc' is not known: did you mean 'focal'"):
        check_loss("foc", 2.0, None, 3)
    with pytest.raises(ValueError, match=r"task.class_weights=\[1, 2\] must be balanced, or 3 numbers"):
        check_loss("ce", 2.0, [1, 2], 3)
    with pytest.raises(ValueError, match=r"task.focal_gamma=-1"):
        check_loss("focal", -1, None, 3)


def test_a_balanced_epoch_has_every_class_as_often_and_follows_from_seed_and_epoch():
    labels = np.array([0] * 900 + [1] * 100)
    options = {"batch_size": 10, "shuffle": True, "seed": 3, "weights": 1 / np.bincount(labels)[labels]}
    sampler = EpochSampler(1000, **options)
    drawn = [index for index, _ in sampler]
    assert len(drawn) == 1000 and 440 < labels[drawn].sum() < 560
    assert drawn == [index for index, _ in EpochSampler(1000, **options)]
    halves = [[i for i, _ in EpochSampler(1000, rank=rank, world=2, **{**options, "batch_size": 5})] for rank in (0, 1)]
    assert [index for pair in zip(*halves, strict=True) for index in pair] == drawn
    sampler.set_epoch(1)
    assert drawn != [index for index, _ in sampler]


def test_a_probe_computes_gradients_of_the_classifier_alone():
    model = tune(vit(), "probe")
    freeze_statistics(model)
    assert model.head.training and not model.blocks[0].training
    model(torch.randn(2, 3, 160, 160)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    set_trainable(model, "full")
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="needs a classifier"):
        tune(timm.create_model("test_vit", num_classes=0), "probe")


def test_merged_adapters_are_the_plain_model():
    pytest.importorskip("peft")
    images, plain, lora = torch.randn(2, 3, 160, 160), vit(), {"rank": 4, "alpha": 12}
    with torch.no_grad():
        before = plain(images)
        model = tune(vit(), "lora", lora).eval()
        torch.testing.assert_close(model(images), before)  # B is zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        assert {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n} == {
            "head.weight",
            "head.bias",
        }
        merged = merge_lora(model.state_dict(), lora)
        plain.load_state_dict(merged)
        assert (model(images) - before).abs().max() > 1e-2
        torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"task.lora.targets='nothing' fits none of the linear layers: blocks.0"):
        tune(vit(), "lora", {"targets": "nothing"})


def test_options_are_checked():
    with pytest.raises(ValueError, match="did you mean 'probe'"):
        check_tuning("prob", None, None)
    with pytest.raises(ValueError, match=r"task.unfreeze_epoch=1 needs task.tuning=probe"):
        check_tuning("full", 1, None)
    with pytest.raises(ValueError, match=r"task.lora='rnak' is not known: did you mean 'rank'"):
        check_tuning("full", None, {"rnak": 4})


def run(folder, *options):
    """Weights of the model before and after a run of two epochs."""
    task = {}
    build = train.build

    def keep(config):
        trainer, task["it"], data = build(config)
        task["before"] = {name: value.clone() for name, value in task["it"].model.state_dict().items()}
        return trainer, task["it"], data

    train.build = keep
    try:
        train.train(configure(folder, *SHORT, *options))
    finally:
        train.build = build
    return task["before"], task["it"].model.state_dict()


def test_runs_move_what_they_are_told(tmp_path):
    before, after = run(tmp_path / "probe", "task.tuning=probe", "task.loss=bce")
    assert {name for name in after if not torch.equal(before[name], after[name])} == {"head.weight", "head.bias"}
    options = ("task.tuning=probe", "task.unfreeze_epoch=1", "task.loss=focal", "task.class_weights=balanced")
    before, after = run(tmp_path / "unfrozen", *options, "data.balanced=true")
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])
    for name in ("confusion.png", "confusion.csv", "per_class.csv"):
        assert (tmp_path / "unfrozen" / name).is_file()


def test_a_run_with_adapters_leaves_plain_weights(tmp_path):
    pytest.importorskip("peft")
    before, after = run(tmp_path, "task.tuning=lora", "task.lora={rank:2}", "task.optimizer.lr=0.1")
    assert torch.equal(before["blocks.0.attn.qkv.base_layer.weight"], after["blocks.0.attn.qkv.base_layer.weight"])
    weights = load(tmp_path / "checkpoints" / "last.ckpt")
    merged = merge_lora(after, {"rank": 2})
    assert weights.keys() == merged.keys()
    assert all(torch.equal(weights[name], merged[name]) for name in merged)
    assert not torch.equal(merged["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.base_layer.weight"])
    opened = open_model(tmp_path)
    assert opened.names == tuple("0123456789") and opened.img_size == 32


def test_a_run_with_prompts_moves_prompts_alone_and_opens(tmp_path):
    prompt = "task.prompt={kind:tcpa,pool_cls:3,pool_image:3,topk_cls:2,topk_image:2,weight:0.1,random_epochs:1}"
    before, after = run(tmp_path, "task.tuning=prompt", prompt)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if ".prompts." in name or name.startswith("head.")}
    opened = open_model(tmp_path).model
    assert all(torch.equal(value, after[name]) for name, value in opened.state_dict().items())
    with pytest.raises(WeightsError, match="has prompts"):
        export_run(tmp_path, tmp_path / "exported")
    with pytest.raises(ValueError, match=r"task.prompt=.*'length': 0.* does not work: length=0"):
        tune(vit(), "prompt", prompt={"length": 0})
    with pytest.raises(ValueError, match=r"needs task.tuning=prompt, not probe"):
        check_tuning("probe", None, None, {"length": 1})


def test_the_suggested_rate_is_where_the_loss_falls_fastest():
    rates = [1e-5 * 10 ** (i / 20) for i in range(81)]  # to 1e-1
    losses = [2 - 1.5 / (1 + (3e-3 / rate) ** 2) for rate in rates]  # falls fastest at 3e-3, over the logarithm
    assert suggest(rates, losses) == pytest.approx(3e-3, rel=0.13)  # a step of the search
    assert suggest(rates, [1 + rate for rate in rates]) is None


def test_the_search_raises_the_rate_and_says_one(tmp_path, capsys):
    options = ("debug=lr_find", "callbacks.lr_find.steps=40", "trainer.enable_model_summary=false", "logger=none")
    train.train(configure(tmp_path, *options))
    rows = list(csv.DictReader((tmp_path / "lr_find.csv").open()))
    assert float(rows[0]["lr"]) == 1e-6 and float(rows[-1]["lr"]) > 1e-4
    assert (tmp_path / "lr_find.png").is_file() and "learning rate: task.optimizer.lr=" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"min_lr=1.0 must be above 0 and below max_lr=0.1"):
        LearningRateFinder(str(tmp_path), min_lr=1.0, max_lr=0.1)
