"""The pictures show what the geometry says: pixels are counted, and heat maps held against products of masks."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from foveal.kernels.neighborhood import geometry, make_axes
from foveal.kernels.neighborhood.plot import (
    FONT,
    KEY,
    QUERY,
    SHARED,
    UNSEEN,
    composed_weights,
    plot_composed_receptive_field,
    plot_receptive_field,
)
from PIL import Image


def pixels(path, color: str) -> int:
    """Pixels of exactly one colour."""
    rgb = np.asarray(Image.open(path).convert("RGB"))
    return int((rgb == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())


def seen_share(path) -> float:
    seen = pixels(path, KEY) + pixels(path, SHARED) + pixels(path, QUERY)
    return seen / (seen + pixels(path, UNSEEN))


@pytest.mark.parametrize(
    "shape, options, query",
    [
        ((100, 100), {"window": 51}, (50, 50)),
        ((100, 100), {"window": 51, "causal": (True, False)}, (30, 99)),
        ((100, 90), {"window": (40, 30), "stride": (20, 15)}, (0, 89)),
        ((100, 100), {"window": 50, "dilation": (2, 1)}, (7, 7)),
    ],
)
def test_the_keys_cover_their_share_of_an_image(shape, options, query, tmp_path):
    path = plot_receptive_field(shape, **options, query=query, path=tmp_path / "field.png")
    row = np.ravel_multi_index(query, shape)
    expected = geometry.mask(make_axes(shape, **options))[row].double().mean()
    assert seen_share(path) == pytest.approx(float(expected), abs=0.01)


def test_the_keys_cover_their_share_of_a_sequence(tmp_path):
    options = {"window": 40, "stride": 7, "causal": True}
    path = plot_receptive_field((200,), **options, path=tmp_path / "field.png")
    expected = geometry.mask(make_axes((200,), **options)).double().mean()
    assert seen_share(path) == pytest.approx(float(expected), abs=0.01)


def test_a_long_sequence_is_drawn_as_a_band(tmp_path):
    path = plot_receptive_field((4000,), window=1000, path=tmp_path / "field.png")
    assert seen_share(path) == pytest.approx(0.25, abs=0.02)


def test_queries_that_share_the_window_are_told_apart(tmp_path):
    strided = plot_receptive_field((100, 100), window=40, stride=20, query=(50, 50), path=tmp_path / "strided.png")
    plain = plot_receptive_field((100, 100), window=40, query=(50, 50), path=tmp_path / "plain.png")
    assert pixels(plain, SHARED) == 0
    assert pixels(strided, SHARED) / (pixels(strided, KEY) + pixels(strided, SHARED)) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    "shape, window", [((8, 14, 14), (3, 7, 7)), ((30, 48, 80), (18, 24, 24)), ((1, 5, 5), (1, 3, 3))]
)
def test_a_clip_has_a_panel_a_frame(shape, window, tmp_path):
    path = plot_receptive_field(shape, window=window, path=tmp_path / "new" / "folder" / "field.png")
    assert path == tmp_path / "new" / "folder" / "field.png"
    assert Image.open(path).format == "PNG" and pixels(path, KEY) and pixels(path, QUERY)


def test_by_default_an_image_has_three_queries(tmp_path):
    one = plot_receptive_field((20, 20), window=5, query=(10, 10), path=tmp_path / "one.png")
    three = plot_receptive_field((20, 20), window=5, path=tmp_path / "three.png")
    width, height = Image.open(three).size
    assert width > 1.8 * height and Image.open(one).size[0] < width


LAYERS = [{"window": 3}, {"window": 3, "dilation": 3}, {"window": (4, 3), "stride": 2, "causal": (True, False)}]


@pytest.mark.parametrize("query", [(4, 6), (0, 0), (9, 11)])
def test_composed_weights_are_products_of_the_masks(query):
    shape = (10, 12)
    stack = [make_axes(shape, **layer) for layer in LAYERS]
    share = torch.zeros(120, dtype=torch.float64)
    share[np.ravel_multi_index(query, shape)] = 1
    for axes, got in zip(reversed(stack), composed_weights(stack, query), strict=True):
        mask = geometry.mask(axes).double()
        share = share @ (mask / mask.sum(1, keepdim=True))
        torch.testing.assert_close(got.flatten(), share, rtol=1e-12, atol=1e-15)


def test_composed_picture_leaves_grey_what_no_path_reaches(tmp_path):
    path = plot_composed_receptive_field((100, 100), [{"window": 51}], path=tmp_path / "field.png")
    yellow = pixels(path, "#fde724")  # the upper end of viridis: one layer weighs all its keys alike
    assert yellow / (yellow + pixels(path, UNSEEN)) == pytest.approx(0.51**2, abs=0.02)


@pytest.mark.parametrize("shape", [(64,), (14, 14), (4, 9, 9)])
def test_composed_pictures_of_every_rank(shape, tmp_path):
    layers = [{"window": 3}, {"window": 3, "dilation": (1, 3, 3)[-len(shape) :]}] * 5
    path = plot_composed_receptive_field(shape, layers, path=tmp_path / "field.png")
    assert Image.open(path).format == "PNG"


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda p: plot_receptive_field((8, 8), window=9, path=p), "window=9 on axis 0"),
        (lambda p: plot_receptive_field((8, 8), window=3, query=(8, 0), path=p), "query=(8, 0)"),
        (lambda p: plot_receptive_field((8, 8), window=3, query=4, path=p), "query=(4,)"),
        (lambda p: plot_receptive_field((4, 4, 4, 4), window=3, path=p), "1 to 3 axes"),
        (lambda p: plot_composed_receptive_field((8, 8), [], path=p), "at least one layer"),
        (lambda p: plot_composed_receptive_field((4, 4, 4, 4), [{"window": 3}], path=p), "1 to 3 axes"),
        (lambda p: plot_composed_receptive_field((8, 8), [{"window": 3, "dilation": 3}], path=p), "dilation=3"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(call, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)):
        call(tmp_path / "field.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_callers_matplotlib_stays_as_it_is(tmp_path):
    code = f"""
import sys
from foveal.kernels.neighborhood.plot import plot_receptive_field
assert "matplotlib" not in sys.modules
import matplotlib
before = {{name: matplotlib.rcParams[name] for name in {sorted(FONT)}}}
plot_receptive_field((9, 9), window=3, path={str(tmp_path / "field.png")!r})
assert before == {{name: matplotlib.rcParams[name] for name in before}}
assert "matplotlib.pyplot" not in sys.modules, "pyplot picks a backend for the whole process"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
