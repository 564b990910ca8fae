"""measure and tune on a tiny random Wan pipeline; accelerate in that pipeline."""

import csv
import json
import math
import sys
from urllib.error import URLError

import pytest
import torch
from foveal.zoo import accelerate, decelerate, sites
from foveal.zoo.accelerate import Plan, explain, measure, tune
from foveal.zoo.accelerate.measure import perceptual, psnr, run, ssim
from foveal.zoo.accelerate.recall import Recall
from foveal.zoo.accelerate.tune import parse_budget
from generators import build
from generators import run as forward
from PIL import Image
from sparse_plans import two_blocks, window_pairs
from tiny_wan import call, tiny_wan

CANDIDATES = [{"window": 2}, {"window": 3}, {"window": (3, 3, 5)}]


def test_dense_steps_of_a_pipeline():
    pipe = tiny_wan()
    dense = run(pipe, 0, call())
    with accelerate(pipe, {"window": 2}, dense_steps=(0.5, 1)) as acceleration:
        mine = run(pipe, 0, call())
        assert set(acceleration.dense.values()) == {"dense_steps=(0.5, 1), noise=None: step 3"}
    same = [torch.equal(a, b) for a, b in zip(mine.latents, dense.latents, strict=True)]
    assert same == [True, True, False, False]
    with accelerate(pipe, {"window": 2}, dense_steps=4):
        assert torch.equal(run(pipe, 0, call()).frames, dense.frames)
    decelerate(pipe)
    assert torch.equal(run(pipe, 0, call()).frames, dense.frames)


def test_branches_of_a_pipeline():
    pipe = tiny_wan()
    dense = run(pipe, 0, call())
    rows = []

    def halve(call, following):
        return 0.5 * following(call)

    def plan(site, layout, moment):
        rows.append(moment.rows)
        return True

    outs = []
    for branches in (["cond"], ["uncond"], ["cond", "uncond"]):
        schedule = sites.Schedule(branches=branches)
        with sites.Interception(pipe, halve, schedule=schedule, plan=plan):
            outs.append(run(pipe, 0, call()).latents[0])
    assert {tuple(x) for x in rows} == {("cond",), ("uncond",)}, "Wan calls its transformer once per branch"
    assert not any(torch.equal(out, other) for out in outs for other in (dense.latents[0], *outs) if other is not out)


def test_recall_is_the_mass_of_the_softmax():
    model, inputs = build("wan", batch=2)
    expected = []

    def look(call, following):
        query, key = (x.transpose(1, 2) for x in (call.query, call.key))
        mass = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        expected.append((mass * window_pairs((3, 4, 4), 3)).sum(-1).mean((0, 2)))
        return following(call)

    chosen = sites.select(sites.find(model), kinds=["self"])
    with sites.Interception(model, look, sites=chosen):
        plain = forward(model, inputs)
    for plan in ({"window": 3}, {"mask": two_blocks}):
        with Recall(model, Plan(**plan)) as recall:
            assert torch.equal(forward(model, inputs), plain), "observing changes nothing"
        assert list(recall.mean) == [site.path for site in chosen]
        if "window" in plan:
            for path, heads in zip(recall.mean, expected, strict=True):
                assert recall.mean[path] == pytest.approx(heads.mean().item(), abs=1e-6)
                assert recall.worst[path] == pytest.approx(heads.min().item(), abs=1e-6)
        assert all(0 < recall.worst[path] <= mean < 1 for path, mean in recall.mean.items())


def test_recall_counts_text():
    model, inputs = build("hunyuan", batch=2)
    with Recall(model, Plan(window=1)) as recall:
        forward(model, inputs)
    assert all(mean > 5 / 66 for mean in recall.mean.values()), "text is kept, so a window of one token keeps more"


def test_measure(tmp_path):
    pipe = tiny_wan(layers=2)
    at_work = accelerate(pipe, {"window": 3})
    changes = {"dense_steps": 1, "dense_layers": [0]}
    found = measure(pipe, {"window": 2}, changes=changes, lpips=lambda x, y: (x - y).abs().mean(), **call())
    assert 0 < found.lpips < found.yardstick_lpips and f"LPIPS {found.lpips:.4f} (dense with" in str(found)
    assert at_work.interception.installed, "a plan at work is put back"
    assert found.psnr_by_step[0] == math.inf and all(0 < x < math.inf for x in found.psnr_by_step[1:])
    assert found.psnr > found.yardstick > 0, "closer to dense than another seed is"
    assert list(found.recall) == ["transformer.blocks.1.attn1"] == list(found.worst_head)
    assert found.dense == {"transformer.blocks.0.attn1": "dense_layers=(0,)"}
    text = str(found)
    assert 1 > found.ssim > found.yardstick_ssim and not any(run.graphs for run in found.runs.values())
    assert f"SSIM {found.ssim:.3f} (dense with another seed:" in text and "worst head" in text and "x\n" in text
    found.save(tmp_path)
    rows = list(csv.DictReader((tmp_path / "steps.csv").open()))
    assert len(rows) == 4 and rows[0]["psnr"] == "inf"
    assert next(csv.DictReader((tmp_path / "sites.csv").open()))["site"] == "transformer.blocks.1.attn1"
    sheet = Image.open(tmp_path / "contact_sheet.png")
    assert sheet.width > sheet.height and len(sheet.getcolors(1 << 24)) > 100
    assert json.loads((tmp_path / "plan.json").read_text())["window"] == 2
    whole = measure(pipe, {"window": 99}, recall_steps=0, **call())
    assert whole.psnr == math.inf and whole.ssim == pytest.approx(1) and not whole.recall


def test_perceptual_distance_by_what_is_there(monkeypatch):
    frames = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))  # grey: three equal channels
    given = []

    def of_images(x, y):
        given.append((x, y))
        return (x - y).square().mean((1, 2, 3))

    distance = perceptual(of_images)
    assert distance(frames, frames) == 0 and distance(frames, 1 - frames) > 0
    assert all(x.shape == (3, 3, 8, 8) and -1 <= x.min() < 0 < x.max() <= 1 for pair in given for x in pair)
    lpip = pytest.importorskip("torchmetrics.image.lpip")

    class Offline:
        def __init__(self, net_type):
            raise URLError(f"no {net_type} here")

    monkeypatch.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", Offline)
    with pytest.raises(ImportError, match=r"lpips='alex' needs torchmetrics, .* \(<urlopen error no alex here>\)"):
        measure(None, {"window": 2}, lpips="alex")
    with pytest.raises(ValueError, match="lpips='inception' must be one of"):
        measure(None, {"window": 2}, lpips="inception")


def test_ssim_of_frames_smaller_than_its_window():
    torch.manual_seed(0)
    frames = torch.rand(2, 3, 6, 9)
    assert ssim(frames, frames) == pytest.approx(1) and ssim(torch.rand_like(frames), frames) < 0.5


def test_graphs_of_a_compiled_pipeline_are_counted():
    pipe = tiny_wan(layers=2)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    assert run(pipe, 0, call()).graphs > 0 and run(pipe, 1, call()).graphs == 0


def test_tune_by_recall_goes_on(tmp_path, monkeypatch):
    pipe, output = tiny_wan(), tmp_path / "plan.json"
    plan = tune(
        pipe, "recall>=0.2", candidates=CANDIDATES, output=output, plan={"dense_steps": 1}, progress=False, **call()
    )
    assert plan.dense_steps == 1 and plan.layers == {0: {"window": 3}, 1: {"window": 3}}
    with accelerate(pipe, output) as acceleration:
        run(pipe, 0, call())
        assert len(acceleration.sparse) == 2
    monkeypatch.setattr(sys.modules["foveal.zoo.accelerate.tune"], "run", None)
    again = tune(pipe, "recall>=0.05", candidates=CANDIDATES, output=output, progress=False, **call())
    assert again.layers == {0: {"window": 2}, 1: {"window": 2}}, "observations of the first search serve the second"
    with pytest.raises(ValueError, match=r"no layer keeps recall>=0.99 with these candidates; the best has 0\."):
        tune(pipe, "recall>=0.99", candidates=CANDIDATES, output=output, progress=False, **call())


@pytest.mark.slow
def test_tune_by_psnr_and_speed(tmp_path):
    pipe = tiny_wan()
    dense = run(pipe, 0, call()).frames
    options = {"candidates": CANDIDATES, "output": tmp_path / "plan.json", "progress": False}
    worst = {}
    for window in (2, 3):
        with accelerate(pipe, {"window": window}):
            worst[window] = psnr(run(pipe, 0, call()).frames, dense, 1.0)
    plan = tune(pipe, f"psnr>={worst[2] - 1}", **options, **call())
    assert plan.layers == {0: {"window": 2}, 1: {"window": 2}} and "PSNR" in plan.source
    with pytest.raises(ValueError, match=r"no plan of these candidates reaches psnr>=99; the best has"):
        tune(pipe, "psnr>=99", **options, **call())
    size = {"height": 64, "width": 96, "frames": 9}
    plan = tune(pipe, "speedup>=1.05", **options, size=size, **call())
    assert explain(pipe, plan, steps=4, **size).speedup >= 1.05
    with pytest.raises(ValueError, match="no plan of these candidates reaches speedup>=9; the best has"):
        tune(pipe, "speedup>=9", **options, size=size, **call())


@pytest.mark.parametrize("budget", ["fast", "recall>0.5", "ssim>=0.5", "psnr>="])
def test_wrong_budget(budget):
    with pytest.raises(ValueError, match="budget="):
        parse_budget(budget)
    with pytest.raises(ValueError, match="needs size="):
        tune(None, "speedup>=2")
