"""Pictures of words, and properties of single edits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from foveal.zoo.control import Control, edits, heatmap
from foveal.zoo.control.plot import main, overlay
from generators import build, run
from stub_tokenizer import StubTokenizer


class Pipeline:
    """Calls a model once, as far as `heatmap` needs a pipeline."""

    do_classifier_free_guidance = False
    tokenizer = StubTokenizer()

    def __init__(self):
        self.model, self.inputs = build("sd unet")
        self.components = {"unet": self.model}
        self.scheduler = SimpleNamespace(timesteps=[500])

    def __call__(self, prompt):
        run(self.model, self.inputs)
        return SimpleNamespace(images=[np.random.default_rng(0).random((72, 96, 3))])


def test_words_are_drawn_over_an_image(tmp_path):
    image, maps = heatmap(Pipeline(), "a tiger on the", ["tiger", "on"])
    assert set(maps) == {"tiger", "on"} and maps["on"].shape == (9, 12)
    drawn = overlay(image, maps, tmp_path / "words.png")
    assert drawn.stat().st_size > 5000


def test_merged_duplicates_count_as_often_as_they_were():
    """With sizes as a bias, tokens that occur twice give what they gave without merging."""
    model, inputs = build("sd unet")
    inputs["sample"] = torch.ones_like(inputs["sample"])  # tokens of the inner maps differ by borders alone

    class Twice(edits.MergeTokens):
        def attend(self, call, plan, rows, following):
            half = call.query.shape[1] // 2
            doubled = [torch.cat([x[:, :half], x[:, :half]], 1) for x in (call.query, call.key, call.value)]
            part = type(call)(call.site, call.index, *doubled, scale=call.scale)
            marks = torch.zeros(2 * half, dtype=torch.bool)
            marks[:half] = True
            context = SimpleNamespace(span=lambda *arguments, **options: (0, 2 * half))
            merged = super().attend(part, (context, marks), rows, following)
            assert (merged - following(part)).abs().max() < 1e-10
            seen.append(half)
            return following(call)

    seen = []
    with Control(model, Twice(0.5, log_size=True)):
        run(model, inputs)
    assert seen


def test_visible_regions_leave_out_gradients():
    """In one attention no gradient crosses regions, and words reach their region alone."""
    mask = torch.zeros(6, 8)
    mask[:, :4] = 1
    rules = {("image", "image"): "region", ("image", "entity"): "region", ("entity", "entity"): "own",
             ("text", "text"): "all", ("image", "text"): "all", ("entity", "text"): "all"}  # fmt: skip
    model, inputs = build("sd3")
    jacobian = []

    class Look(edits.Visible):
        def attend(self, call, plan, rows, following):
            with torch.enable_grad():
                value = call.value.detach().requires_grad_()
                out = super().attend(type(call)(call.site, 0, call.query, call.key, value), plan, rows, following)
                (gradient,) = torch.autograd.grad(out[:, 0].sum(), value)  # of the first pixel, in the left half
            jacobian.append(gradient.abs().sum((0, 2, 3)))
            return following(call)

    found = Look(rules, torch.stack([mask, 1 - mask]), ("left", "right"))
    with Control(model, found, words={"left": [1], "right": [2]}):
        run(model, inputs)
    reached = jacobian[0] > 0  # 6 x 8 pixels, then 5 words
    assert torch.equal(reached[:48], mask.flatten() > 0) and reached[48:].tolist() == [True, True, False, True, True]


def test_command_refuses_what_is_no_pipeline(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), "a cat", "cat"])
    assert end.value.code == 2 and f"model {tmp_path} cannot be opened" in capsys.readouterr().err
