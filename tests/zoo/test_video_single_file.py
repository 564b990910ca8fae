"""A pipeline of pixels in one file: what it holds, what it refuses, what is no such file."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from foveal.weights import WeightsError, save
from foveal.zoo.inference.sample import SHIPPED, is_shipped, open_pipeline, sample_clips
from foveal.zoo.video.single_file import load_single_file, save_single_file
from video_models import CALL, letters, seeded, tiny_pipe


@pytest.mark.parametrize("conditioning", ["class", None])
def test_a_pipeline_comes_back_from_its_file(conditioning, tmp_path):
    pipe = tiny_pipe(conditioning)
    if conditioning:
        pipe.register_to_config(id2label={"0": "zero", "1": "one"})
    path = save_single_file(pipe, tmp_path / "pipe.safetensors")
    assert path == tmp_path / "pipe.safetensors"
    again = load_single_file(path)
    ours, theirs = again.transformer.state_dict(), pipe.transformer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(
        value.dtype == torch.float32 and torch.equal(value, theirs[n].half().float()) for n, value in ours.items()
    )
    for part in ("transformer", "scheduler"):
        told = [{k: v for k, v in getattr(p, part).config.items() if not k.startswith("_")} for p in (pipe, again)]
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in told[0].items()} == {
            k: list(v) if isinstance(v, tuple) else v for k, v in told[1].items()
        }
    assert [list(again.config[name]) for name in ("pixel_mean", "pixel_std", "sample_size")] == [
        [0.2],
        [0.4],
        [4, 8, 8],
    ]
    again.set_progress_bar_config(disable=True)
    pipe.transformer.load_state_dict(ours)
    call = CALL | ({"class_labels": ["one"]} if conditioning else {})
    made = [p(**call, generator=seeded(), output_type="pt").frames for p in (pipe, again)]
    assert torch.equal(*made) and made[0].std() > 0


def test_other_components_are_refused(tmp_path):
    told = tiny_pipe("cross", text_encoder=letters)
    other = tiny_pipe()
    other.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    for pipe, named in ((told, "text_encoder, FlowMatchEulerDiscreteScheduler"), (other, "UniPCMultistepScheduler")):
        with pytest.raises(ValueError, match=f"this pipeline has {named}: use save_pretrained"):
            save_single_file(pipe, tmp_path / "pipe.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_is_no_such_file_is_said(tmp_path):
    pipe = tiny_pipe()
    weights = dict(pipe.transformer.state_dict())
    whole = save_single_file(pipe, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    save(weights, tmp_path / "plain.safetensors")
    save(weights, tmp_path / "words.safetensors", metadata={"pipeline": "{"})
    save(weights, tmp_path / "other.safetensors", metadata={"pipeline": '{"transformer": {"layers": 1}}'})
    for name in ("none", "cut", "plain", "words", "other"):
        with pytest.raises(WeightsError, match=rf"{name}\.safetensors is no pipeline in a single file: "):
            load_single_file(tmp_path / f"{name}.safetensors")


def test_the_digits_that_ship_know_their_classes_and_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(SHIPPED) == {"digits"} and is_shipped("digits")
    pipe = open_pipeline("digits")
    assert list(pipe.labels) == [str(i) for i in range(10)] and pipe.config.sample_size == [8, 32, 32]
    assert not pipe.transformer.training
    (tmp_path / "digits" / "pipeline").mkdir(parents=True)  # a run of this name goes first
    assert not is_shipped("digits")
    with pytest.raises(FileNotFoundError, match=r"nor a model of this package \(digits\)"):
        sample_clips(tmp_path / "three")
