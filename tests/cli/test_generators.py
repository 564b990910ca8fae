"""Commands on generators: where the time of a pipeline goes, and maps of words."""

import json

import pytest
from foveal.cli import app
from foveal.zoo.inference import sample
from foveal.zoo.inference.profile_pipeline import operator_class, profile_pipeline, tokens_of
from tiny_pipeline import TinyPipeline
from typer.testing import CliRunner
from video_models import tiny_pipe

CALL = {
    "class_labels": [1, 2],
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
    "num_frames": 2,
    "height": 8,
    "width": 8,
}


def command(*arguments, code=0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_attention_counts_what_the_cost_model_says():
    """FLOPs of attention are those of the shapes, shares sum to 1, and every step is there."""
    pipe = tiny_pipe("class", attention=["dense", "temporal"])
    found = profile_pipeline(pipe, **CALL)
    model, tokens = pipe.transformer.config, 2 * 2 * 2  # 2 frames of 2 x 2 patches
    width = model.num_attention_heads * model.attention_head_dim
    clips, evaluations = 2, 2 * 3  # two labels, with and without them
    by_kind = {kind: cost for (kind,), cost in found.by("class").items()}
    assert by_kind["attention (self)"].flops == evaluations * clips * 4 * width * (tokens * tokens + tokens * 2)
    assert abs(sum(row["share"] for row in found.rows()) - 1) < 1e-3
    assert [step["step"] for step in found.steps()] == [0, 1, 2] and by_kind["linear"].flops > 0
    assert list(tokens_of(found)) == [(8, 8), (2, 2)]
    processors = [block.attn1.processor for block in pipe.transformer.blocks]
    assert all("Intercepted" not in type(processor).__name__ for processor in processors)


def test_operators_have_classes():
    kinds = {"addmm": "linear", "convolution": "convolution", "native_layer_norm": "norm", "gelu": "other"}
    kinds |= {"_scaled_dot_product_flash_attention_for_cpu": "attention"}
    assert {name: operator_class(name) for name in kinds} == kinds


def test_profile_of_a_pipeline(tmp_path):
    tiny_pipe("class").save_pretrained(tmp_path)
    options = [part for name, value in CALL.items() for part in ("--set", f"{name}={value}")]
    found = json.loads(command("profile", tmp_path, "--json", *options).stdout)
    assert {row["class"] for row in found["operators"]} >= {"linear", "attention (self)"} and len(found["steps"]) == 3
    assert "8 queries x 8 keys" in command("profile", tmp_path, *options).stdout
    refused = command("profile", tmp_path, "--set", "prompt", code=2)
    assert "--set 'prompt' must be NAME=VALUE" in refused.stderr


def test_plot_words(tmp_path, monkeypatch):
    pipe = TinyPipeline()
    pipe.to = lambda device: pipe
    call = type(pipe).__call__

    class Pictures(TinyPipeline):
        def __call__(self, prompt, generator, **options):
            result = call(self, [prompt], [generator], **options)
            result.images = [result.images[0][:3].movedim(0, -1).sigmoid().numpy()]
            return result

    pipe.__class__ = Pictures
    monkeypatch.setattr(sample, "open_generator", lambda source: pipe)
    out = tmp_path / "words.png"
    command("plot", "words", "any", "a tiger on the grass", "tiger", "grass", "--steps", 2, "--out", out)
    assert out.stat().st_size > 5000
    refused = command("plot", "words", "any", "a tiger", "bike", "--out", out, code=2)
    assert "has no word 'bike'" in refused.stderr
    assert "must be height,width" in command("plot", "words", "any", "a", "a", "--size", "5", code=2).stderr


@pytest.mark.parametrize("name", ["natten_dinat_pico"])
def test_arguments_of_a_call_are_for_pipelines(name):
    assert "--set is for pipelines" in command("profile", name, "--set", "a=1", code=2).stderr
