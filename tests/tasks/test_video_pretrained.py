"""Video training from weights that exist: all of them, adapters, a sparse model that imitates a dense one."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from foveal import train
from foveal.zoo.tasks.video import VideoDiffusionTask
from foveal.zoo.video import VideoDiT
from foveal.zoo.video.flow import add_noise
from foveal.zoo.video.pipeline import VideoDiTPipeline
from train_helpers import assert_one_sentence
from video_helpers import randomize
from video_tasks import TINY, tiny

SPARSE = {"type": "sparse", "mask": "vsa", "options": {"block": [1, 2, 2]}, "budget": 0.5}
PRETRAINED = ("model.preset=null", "model.args=null", "trainer.max_epochs=1", "trainer.limit_val_batches=1")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model of moving digits, nothing in it zero, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    args = {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 16}
    model = VideoDiT.from_preset("nano", conditioning="class", num_classes=10, **args)
    randomize(model).save_pretrained(folder)
    return folder


def task_of(pretrained, *, args=None, num_classes=10, **options) -> VideoDiffusionTask:
    model = {"pretrained": str(pretrained), "conditioning": "class", "args": args}
    task = VideoDiffusionTask(
        model=model, in_channels=1, num_classes=num_classes, optimizer={"opt": "adamw", "lr": 1e-3}, **options
    )
    task.configure_model()
    task.log = lambda *args, **kwargs: None
    return task


def a_batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(4, 1, 4, 16, 16, generator=generator)
    return {"video": video, "label": torch.arange(4), "real": torch.ones(4, dtype=torch.bool)}


def test_training_starts_from_saved_weights(saved, capsys):
    batch, t = a_batch(), torch.full((4,), 400.0)
    expected = VideoDiT.from_pretrained(saved)(batch["video"], t, class_labels=batch["label"]).sample
    same = task_of(saved).model(batch["video"], t, class_labels=batch["label"]).sample
    assert torch.equal(same, expected) and same.abs().max() > 0.1
    with pytest.warns(UserWarning, match="1 parameters of .* start anew"):
        other = task_of(saved, num_classes=3)
    assert other.model.class_embed.weight.shape == (4, 16)
    ours, theirs = other.model.state_dict(), VideoDiT.from_pretrained(saved).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "class_embed.weight")
    with pytest.raises(ValueError, match=r"has weights that the model has no place for: blocks\.1"):
        task_of(saved, args={"num_layers": 1})
    with pytest.raises(ValueError, match=r"blocks.0.mlp.up.weight has \[64, 16\]; the model needs \[32, 16\]"):
        task_of(saved, args={"mlp_ratio": 2})


def test_a_sparse_model_imitates_its_dense_teacher(saved):
    batch = a_batch()
    losses = {}
    for weight in (0.0, 0.25, 1.0):
        task = task_of(saved, args={"attention": [SPARSE]}, teacher=str(saved), teacher_weight=weight)
        task.on_train_batch_start(batch, 0)
        losses[weight] = task.training_step(batch, 0)
    assert not any("teacher" in name for name in task.state_dict())
    task.on_train_batch_start(batch, 0)
    t, _ = task.draw_time(batch["video"])
    condition = task.condition(batch, dropout=0.1)
    noisy = add_noise(batch["video"], torch.randn_like(batch["video"]), t)
    dense, sparse = (model(noisy, 1000 * t, **condition).sample for model in (task.teacher.model, task.model))
    assert not torch.allclose(dense, sparse, rtol=1e-2)
    torch.testing.assert_close(losses[1.0], (dense - sparse).square().mean())
    torch.testing.assert_close(losses[0.25], 0.75 * losses[0.0] + 0.25 * losses[1.0])
    losses[1.0].backward()
    assert all(p.grad is None for p in task.teacher.model.parameters())
    task.eval()
    plain = task_of(saved, args={"attention": [SPARSE]}).eval()
    for one in (task, plain):
        one.validation_step(batch, 0)
    assert task.metrics["val_loss"].compute() == plain.metrics["val_loss"].compute()


def test_gates_learn_beside_frozen_weights(saved):
    """Of a dense model: its weights get no gradient, its gates that of their imitation of its maps."""
    gated = {"type": "sparse", "mask": "box_gate", "options": {"block": [1, 2, 2]}, "budget": 0.5}
    task, both = (task_of(saved, args={"attention": [gated]}, gates_only=only) for only in (True, False))
    dense = VideoDiT.from_pretrained(saved).state_dict()
    assert all(torch.equal(x, dense[name]) for name, x in task.model.state_dict().items() if name in dense)
    for one in (task, both):
        one.on_train_batch_start(a_batch(), 0)
        one.training_step(a_batch(), 0).backward()
    learning = {name for name, p in task.model.named_parameters() if p.grad is not None}
    assert learning == {name for name in task.model.state_dict() if name not in dense} and len(learning) == 2
    for name, p in both.model.named_parameters():
        assert p.grad is not None and (name in dense or torch.equal(p.grad, task.model.get_parameter(name).grad)), name
    with pytest.raises(ValueError, match=r"task\.gates_only=true: the model has no layer"):
        task_of(saved, gates_only=True)


def test_adapters_are_trained_and_saved(saved, tmp_path):
    start = VideoDiT.from_pretrained(saved)
    config = tiny(tmp_path, *PRETRAINED, f"model.pretrained={saved}", "task.lora={rank:2,alpha:4}")
    trainer, task, data = train.build(config)
    trainer.fit(task, datamodule=data)
    trained = dict(task.model.named_parameters())
    for name, value in start.named_parameters():
        layer, _, kind = name.rpartition(".")
        assert torch.equal(trained.get(f"{layer}.base_layer.{kind}", trained.get(name)), value), name
    moved = [name for name, value in trained.items() if ".lora_B." in name and value.any()]
    assert len(moved) == 2 * 4 and all(trained[name].requires_grad == (".lora_" in name) for name in trained)

    given = {"hidden_states": a_batch()["video"], "timestep": torch.full((4,), 400.0)}
    given["class_labels"] = torch.arange(4)
    expected = task.model.eval()(**given).sample
    whole = VideoDiTPipeline.from_pretrained(tmp_path / "pipeline").transformer
    torch.testing.assert_close(whole(**given).sample, expected, rtol=1e-4, atol=1e-5)
    plain = start(**given).sample
    assert not torch.allclose(plain, expected, rtol=1e-3)
    pipeline = VideoDiTPipeline(start, FlowMatchEulerDiscreteScheduler())
    pipeline.load_lora_weights(tmp_path / "lora", adapter_name="mine")
    torch.testing.assert_close(start(**given).sample, expected, rtol=1e-4, atol=1e-5)
    pipeline.set_adapters("mine", 0.0)
    torch.testing.assert_close(start(**given).sample, plain, rtol=1e-4, atol=1e-5)
    pipeline.set_adapters("mine", 1.0)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(start(**given).sample, expected, rtol=1e-4, atol=1e-5)
    assert train.build(tiny(tmp_path / "on", *PRETRAINED, f"model.pretrained={tmp_path}"))[1]


MISTAKES = [
    (["model.pretrained={saved}"], "pass model.preset=null"),
    (["model.pretrained=/no/such", "model.preset=null"], "model.pretrained='/no/such' is neither the folder"),
    (["task.lora={{rank:4}}"], "trains adapters beside weights that exist: set model.pretrained"),
    (["task.teacher=/no/such"], "task.teacher='/no/such' is neither"),
    (["task.teacher_weight=2"], "task.teacher_weight=2 must be between 0 and 1"),
    (["model.pretrained={saved}", "model.preset=null", "+task.lora.rnk=4"], "task.lora='rnk' is not known"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES, ids=[a[0] for a, _ in MISTAKES])
def test_mistakes_get_one_sentence(arguments, sentence, saved, tmp_path, monkeypatch, capsys):
    fast = [*TINY[:1], "trainer.fast_dev_run=true", f"runs={tmp_path}"]
    assert_one_sentence([*fast, *(a.format(saved=saved) for a in arguments)], sentence, monkeypatch, capsys)
