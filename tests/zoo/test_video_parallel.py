"""Ulysses for VideoDiT by diffusers' `enable_parallelism`: refusals, and two ranks against one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import ContextParallelConfig
from video_models import tiny_model

SUPPORT = Path(__file__).resolve().parents[1] / "support"
WINDOW = {"type": "window", "window": [[3, 2, 2], [1, 2, 2]]}
GATED = {"type": "sparse", "mask": "box_gate", "options": {"block": [1, 2, 2]}, "budget": 0.5}


@pytest.mark.parametrize(
    ("options", "config", "sentence"),
    [
        ({"ring_degree": 2}, {}, "shares tokens by ulysses_degree alone"),
        ({"ulysses_degree": 2, "ulysses_anything": True}, {}, "shares tokens by ulysses_degree alone"),
        ({"ulysses_degree": 3}, {}, "ulysses_degree=3 must divide the 2 heads"),
        ({"ulysses_degree": 2}, {"attention": ["dense", WINDOW]}, "layer 1 has a neighborhood for each head"),
        ({"ulysses_degree": 2}, {"attention": [GATED]}, "layer 0 has box_gate"),
        ({"ulysses_degree": 2}, {"attention": [{"type": "local_scan", "window": 2}]}, "layer 0 has local_scan"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_split(options, config, sentence):
    model = tiny_model(**config)
    with pytest.raises(ValueError, match=sentence):
        model.enable_parallelism(config=ContextParallelConfig(**options))
    assert model._parallel_config is None


@pytest.mark.slow
def test_two_ranks_sample_what_one_process_samples():
    path = os.pathsep.join([str(SUPPORT), *sys.path])
    script = SUPPORT / "video_ulysses_ranks.py"
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, env=os.environ | {"PYTHONPATH": path})
    assert done.stdout.count("equal") == 2, done.stderr[-2000:]
