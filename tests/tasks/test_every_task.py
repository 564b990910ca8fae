"""What every task promises: a run that was resumed ends with the weights of one that was left alone."""

from pathlib import Path

import pytest
from foveal import train
from image_folders import write
from train_helpers import configure, differences

PRETRAINING = ("callbacks=pretraining", "metric=val/loss", "metric_mode=min")
TABLE = ("data=imagetable", "data.root=TABLE", "data.columns=[one,two]", "data.img_size=32")
OPTIONS = {
    "classification": (),
    "probing": ("task.neighbors=3",),
    "bags": (*PRETRAINING, "data=digit_bags"),
    "multilabel": ("callbacks=multilabel", "metric=val/map", *TABLE),
    "regression": ("callbacks=regression", "metric=val/r2", *TABLE, "data.targets=values"),
    "pretraining": (
        *PRETRAINING,
        "task.masking=hard",
        "task.loss_prediction=true",
        "task.teacher_decay=0.5",
        "task.vit={patch_size:8,embed_dim:16,depth:1,num_heads:2,decoder_embed_dim:16,decoder_depth:1,decoder_num_heads:2}",
    ),
    "restoration": (*PRETRAINING, "data=photos", "data.crop=24", "task.network.args={width:8,up_width:8,depth:1}"),
    "segmentation": (
        "data=shapes",
        "data.img_size=32",
        "callbacks=segmentation",
        "metric=val/miou",
        "task.head.width=16",
        "model.args={depths:[1,1,1],embed_dim:8,num_heads:[1,2,4]}",
    ),
    "glimpses": (*PRETRAINING, "data=scattered_digits", "task.canvas.glimpses=2", "task.canvas.embed_dim=16"),
    "captioning": (*PRETRAINING, "data=captioned_digits", "task.captioner.dim=16"),
    "pose": (*PRETRAINING, "data=skeletons", "task.lifter.dim=4"),
    "compression": (
        *PRETRAINING,
        "data=photos",
        "data.scale=1",
        "data.degrade=none",
        "task.regions=3",
        "task.codec={width:8,latent:10,slices:2,sent:4,num_heads:2}",
    ),
    "style": (*PRETRAINING, "data=styles", "data.crop=64", "task.network.width=8"),
    "quality": (*PRETRAINING, "data=degraded_photos", "task.trunk.args.depth=1"),
    "video": (),  # tests/tasks/test_video.py
    "video_consistency": (),  # tests/tasks/test_video_consistency.py
}


def write_table(root: Path) -> Path:
    """A folder of 32 grey images and a table of two numbers for each, 0 or 1."""
    write(root, *[f"{i}.png" for i in range(32)])
    rows = [f"{i}.png,{i % 2},{i // 16},{'train' if i < 24 else 'val'}" for i in range(32)]
    (root / "labels.csv").write_text("\n".join(["file,one,two,split", *rows]))
    return root


def fit(run: Path, name: str, steps: int = -1, checkpoint: Path | None = None) -> dict:
    """State of a task after two epochs of two batches, or after fewer steps of them."""
    few = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "data.batch_size=8", "logger=none")
    options = (*few, *OPTIONS[name], "trainer.max_epochs=2", f"++trainer.max_steps={steps}", "task.scheduler=null")
    tiny = name in ("classification", "probing", "multilabel", "regression")  # others have models of their own
    options = [option.replace("TABLE", str(write_table(run.parent / "images"))) for option in options]
    trainer, task, data = train.build(configure(run, f"task={name}", *options, tiny=tiny))
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return dict(task.state_dict())


def test_every_task_is_here():
    configs = Path(__file__).resolve().parents[2] / "configs" / "task"
    assert set(OPTIONS) == {path.stem for path in configs.glob("*.yaml")}


# others have what they have
SLOW = ("glimpses", "captioning", "pose", "quality", "compression", "style", "multilabel", "regression")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in OPTIONS if not name.startswith("video")],
)
def test_a_resumed_run_is_the_same_run(name, tmp_path):
    whole, begun = fit(tmp_path / "whole", name), fit(tmp_path / "part", name, steps=2)
    resumed = fit(tmp_path / "part", name, checkpoint=tmp_path / "part" / "checkpoints" / "last.ckpt")
    assert differences(resumed, whole) == [] != differences(begun, whole)
