"""examples/steer_digits.py: a few steps of every model, then its numbers and its pictures."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "steer_digits.py"


@pytest.mark.slow
def test_models_are_trained_measured_and_drawn(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("steer_digits", SCRIPT)
    assert spec is not None and spec.loader is not None
    steer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(steer)
    monkeypatch.setattr(steer, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(steer, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(steer, "STEPS", 4)
    with pytest.raises(SystemExit, match="train pairs"):
        steer.pipeline("pairs")
    for name, (options, make, _, _) in steer.MODELS.items():
        monkeypatch.setitem(steer.MODELS, name, (options, make, 2, 4))
        steer.train(name)
    read = steer.judge()
    steer.measure_regions(read, count=2, prompts=1)
    steer.measure_path(read, count=2, routes=2)
    steer.measure_first(read, count=4)
    lines = capsys.readouterr().out.splitlines()
    for name, count in (("regions", 2), ("path", 2), ("first frame", 2)):
        assert sum(line.startswith(f"{name}, ") for line in lines) == count, name
    steer.draw()
    drawn = {path.name: Image.open(path) for path in (tmp_path / "images").iterdir()}
    assert set(drawn) == {"words.png", "prompt_to_prompt.png", "regions.png", "path.gif"}
    assert getattr(drawn["path.gif"], "n_frames", 1) == steer.FRAMES
