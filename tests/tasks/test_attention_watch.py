"""Entropy of attention during training: what is measured is what the model computes, and a collapse is said."""

import csv
import math

import pytest
import timm
import torch
from foveal import train
from foveal.zoo.tasks.attention_watch import AttentionWatch, measure, watched_attentions
from train_helpers import configure


@pytest.mark.parametrize("qk_norm", [False, True])
def test_what_is_measured_is_the_attention_of_the_model(qk_norm):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "qk_norm": qk_norm}
    model = timm.create_model("vit_tiny_patch16_224", **options).double()
    (module,) = watched_attentions(model).values()
    x = 3 * torch.randn(2, 17, 24, dtype=torch.float64)
    found = measure(module, module.qkv(x))
    module.fused_attn = False
    weights = []
    drop = module.attn_drop.register_forward_hook(lambda _, inputs, out: weights.append(out))
    module(x)
    drop.remove()
    entropy = -(weights[0] * weights[0].log()).sum(-1).mean((0, 2)) / math.log(17)  # per head
    assert found["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-9)
    assert found["lowest"] == pytest.approx(entropy.min().item(), rel=1e-9)
    assert found["largest"] == pytest.approx(weights[0].amax(-1).mean().item(), rel=1e-9)


def test_a_run_draws_its_entropy_and_warns_of_a_collapse(tmp_path):
    options = ("callbacks=attention", "callbacks.attention.every=2", "callbacks.attention.alarm=1.0", "logger=none",
               "trainer.max_epochs=1", "trainer.limit_train_batches=3", "trainer.limit_val_batches=1",
               "trainer.limit_test_batches=1", "task.scheduler=null")  # fmt: skip
    with pytest.warns(UserWarning, match="has collapsed at step 0"):
        train.train(configure(tmp_path, *options))
    rows = list(csv.DictReader((tmp_path / "attention.csv").open()))
    assert [(row["step"], row["layer"]) for row in rows] == [
        (step, f"model.blocks.{block}.attn") for step in ("0", "2") for block in (0, 1)
    ]
    assert all(0 < float(row["lowest"]) <= float(row["entropy"]) <= 1 for row in rows)
    assert (tmp_path / "attention.png").is_file()


def test_heads_that_attend_to_one_key_are_named_once():
    watch = AttentionWatch(".", alarm=0.1)
    with pytest.warns(UserWarning, match=r"blocks.0: a head's attention has collapsed at step 5, .* 0.010"):
        watch._note(5, "blocks.0", {"entropy": 0.5, "lowest": 0.01, "largest": 1.0, "lse": 3.0})
    watch._note(6, "blocks.0", {"entropy": 0.5, "lowest": 0.01, "largest": 1.0, "lse": 3.0})
    other = AttentionWatch(".")
    other.load_state_dict(watch.state_dict())
    assert other.rows == watch.rows and len(other.rows) == 2
    for options in ({"every": 0}, {"alarm": 2.0}, {"images": 0}):
        with pytest.raises(ValueError, match=r"callbacks\.attention"):
            AttentionWatch(".", **options)
    with pytest.raises(ValueError, match="no attention of timm's ViT or Swin"):
        watch.on_fit_start(None, torch.nn.Linear(2, 2))
