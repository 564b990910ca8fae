"""Captions: clips move as their words say, words see no later ones, decoding ends, a run, wrong options."""

import pytest
import torch
from foveal import train
from foveal.zoo.captioning import END, START, VideoCaptioner
from foveal.zoo.data.captioned_digits import FIRST, WORDS, CaptionedDigits
from train_helpers import configure

SHORT = ("task=captioning", "data=captioned_digits", "callbacks=pretraining", "logger=none", "metric=val/exact",
         "metric_mode=max", "data.batch_size=4", "data.val_length=6")  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny() -> VideoCaptioner:
    return VideoCaptioner(["a", "b", "c"], frames=2, size=8, in_chans=1, length=4, dim=16, num_heads=2, video_depth=1)


def test_digits_move_as_the_caption_says():
    data = CaptionedDigits(epoch_length=4, batch_size=4)
    data.setup()
    clips, words = next(iter(data.train_dataloader()))
    assert clips.shape == (4, 1, 6, 16, 16) and words.shape == (4, 5)
    for i in range(40):
        clip, words = data.datasets["test"][i]
        said = [WORDS[n - FIRST] for n in words[:-1]]
        dy, dx = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[said[3]]
        assert said[0] == "a" and said[2] == "moves" and words[-1] == END
        for t in range(5):
            torch.testing.assert_close(clip[0, t].roll((dy, dx), (0, 1)), clip[0, t + 1])
    with pytest.raises(ValueError, match=r"data\.frames=12"):
        CaptionedDigits(frames=12)


def test_words_do_not_see_later_ones_and_the_clip_sees_none():
    model = tiny().eval()
    clips, words = torch.rand(2, 1, 2, 8, 8), torch.tensor([[START, 3, 4, 5, 0]] * 2)
    other = words.clone()
    other[:, 3:] = 4
    with torch.no_grad():
        clip = model.encode(clips)
        torch.testing.assert_close(model(clip, words)[:, :3], model(clip, other)[:, :3])
        assert not torch.allclose(model(clip, words)[:, 3], model(clip, other)[:, 3])
        short = model(clip, words[:, :2])  # fewer words change nothing in front
        torch.testing.assert_close(model(clip, words)[:, :2], short)


def test_captions_end_and_masked_words_alone_are_learned():
    model = tiny()
    with torch.no_grad():
        model.head.bias[END] = 100.0
        assert model.caption(torch.rand(2, 1, 2, 8, 8)).eq(END).all()
    model.head.bias.data.zero_()
    words = torch.tensor([[3, 4, 0, 0], [5, 5, 5, 0]])
    assert model.sentences(words) == ["a b", "c c c"]
    model.loss(torch.rand(2, 1, 2, 8, 8), words).backward()
    assert all(p.grad is not None for n, p in model.named_parameters())
    model.loss(torch.rand(2, 1, 2, 8, 8), words, ratio=0.0)  # one word of each caption is masked


@pytest.mark.slow
def test_a_run_and_wrong_options(tmp_path):
    few = ("trainer.max_epochs=1", "trainer.limit_train_batches=2")
    trainer, task, data = train.build(configure(tmp_path, *SHORT, *few, tiny=False))
    trainer.fit(task, datamodule=data)
    names = ("loss", "exact", "words", "visible")
    assert all(torch.isfinite(trainer.callback_metrics[f"val/{name}"]) for name in names)
    with pytest.raises(ValueError, match=r"task\.captioner"):
        train.build(configure(tmp_path, *SHORT, "task.captioner.patch=[4,4]", tiny=False))[1].configure_model()
