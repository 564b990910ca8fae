"""`foveal demo`: its panels against what they show, its server through HTTP, and the page in a browser."""

import base64
import io
import json
import shutil
import threading
import urllib.error
import urllib.request
from http.client import HTTPConnection

import numpy as np
import pytest
import torch
from browser import browser
from foveal.kernels.ops import na2d
from foveal.zoo.data.digits import split_digits
from foveal.zoo.demo import Panels, make_server
from foveal.zoo.demo.panels import data_url, neighborhood_panel, read_drawing
from foveal.zoo.inference.source import OpenedModel
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture(scope="module")
def url():
    """Address of a server that runs."""
    with make_server(Panels(generator=None)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.url
        server.shutdown()


def ask(url: str, panel: str, chosen, *, kind: str = "application/json") -> tuple[int, dict]:
    """Status and answer of a request."""
    body = chosen if isinstance(chosen, bytes) else json.dumps(chosen).encode()
    request = urllib.request.Request(url + panel, data=body, headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def as_drawn(scan: np.ndarray) -> np.ndarray:
    """A scan as somebody would draw it: large, anywhere on the paper."""
    ink = Image.fromarray((scan * 255 / 16).astype(np.uint8)).resize((40, 40), Image.Resampling.BICUBIC)
    paper = np.zeros((70, 70), np.uint8)
    paper[5:45, 22:62] = np.asarray(ink)
    return paper


def test_a_drawing_is_read_as_the_scans_were_made():
    numbers, targets = split_digits()["test"]
    panels, right = Panels(generator=None), 0
    for number, digit in list(zip(numbers, targets, strict=True))[:20]:
        told = panels.drawing(pixels=as_drawn(load_digits().images[number]).tolist())
        right += int(np.argmax(told["shares"])) == digit
        assert sum(told["shares"]) == pytest.approx(1, abs=1e-3)
    assert right >= 18
    assert np.array(told["field"]).sum() == pytest.approx(1, abs=1e-3)
    assert np.shape(told["attention"]) == (8, 8) and told["token"] == [4, 4] and np.shape(told["scan"]) == (8, 8)


def test_place_and_size_of_a_drawing_do_not_matter():
    paper = torch.zeros(60, 60)
    paper[10:30, 20:24] = 255
    moved = torch.zeros(200, 120)
    moved[100:180, 60:76] = 255
    one, other = read_drawing(paper.tolist()), read_drawing(moved.tolist())
    torch.testing.assert_close(one, other, atol=0.02, rtol=0)
    assert one[:, 3:5].min() > 0.7 and one[:, :2].max() == 0  # a stroke from top to bottom, in the middle


@pytest.mark.parametrize(
    "options", [{"window": 5}, {"window": 4, "stride": 2}, {"window": 3, "dilation": 3, "causal": True}]
)
def test_neighborhood_shows_the_keys_that_attention_uses(options):
    size, query = 11, (2, 9)
    told = neighborhood_panel(size=size, query=query, **options)
    value = torch.eye(size * size).view(1, size, size, 1, -1)
    zeros = torch.zeros(1, size, size, 1, size * size)
    weights = na2d(zeros, zeros, value, **options)[0, *query, 0].view(size, size)  # uniform over what is seen
    assert (weights > 0).int().tolist() == told["keys"]
    assert told["visible"] == int((weights > 0).sum()) and told["tokens"] == 121
    assert told["flops"] == pytest.approx(told["share"] * told["dense_flops"])
    assert 0 < told["efficiency"] <= 1 and told["speedup"] > 0 and told["microseconds"] > 0


def test_neighborhood_counts_as_the_page_of_costs():
    told = neighborhood_panel(size=56, window=7)
    assert (
        told["speedup"] > 12.2 and told["efficiency"] > 0.19
    )  # of tiles of 8×8 by 8×8, docs/cost.md; others are better
    assert told["bound"] == "memory" and told["flops"] == 4 * 56**2 * 49 * 4 * 64


def test_clips_are_gifs():
    frames = torch.rand(5, 8, 12)
    kind, data = data_url(frames, fps=8, side=24).split(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/gif;base64" and picture.size == (24, 16) and picture.n_frames == 5


def test_server_gives_the_page_and_answers(url):
    with urllib.request.urlopen(url) as answer:
        page = answer.read().decode()
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert 'id="pad"' in page and "http://" not in page and "https://" not in page  # nothing from elsewhere
    assert ask(url, "about", {})[1]["classes"] == list("0123456789")
    assert ask(url, "neighborhood", {"size": 8, "window": 3})[1]["visible"] == 9


PAPER = [[0] * 8] * 8


@pytest.mark.parametrize(
    ("panel", "chosen", "said"),
    [
        ("nowhere", {}, "panel 'nowhere' must be one of about, drawing, clip, neighborhood"),
        ("neighborhood", {"size": 8}, "missing a required argument: 'window'"),
        ("neighborhood", {"size": 8, "window": 9}, "window"),
        ("neighborhood", {"size": 10**9, "window": 3}, "size=1000000000 must be a whole number from 1 to 64"),
        ("neighborhood", {"size": 8, "window": 3, "query": [8, 0]}, "query=8"),
        ("neighborhood", {"size": 8, "window": 3, "query": "ab"}, "query"),
        ("drawing", {"pixels": PAPER}, "nothing is drawn yet"),
        ("drawing", {"pixels": [[1, 2], [3]]}, "pixels must be rows of equal length"),
        ("drawing", {"pixels": [[256]]}, "numbers from 0 to 255"),
        ("drawing", {"pixels": [[float("nan")]]}, "numbers from 0 to 255"),
        ("drawing", {"pixels": [[255]], "layer": 99}, "layer=99 must be a whole number from 0 to 4"),
        ("drawing", {"pixels": [[255]], "place": [2, 0]}, "place=(2.0, 0.0) must be two numbers from 0 to 1"),
        ("drawing", {"pixels": [[255]], "place": "ab"}, "place='ab'"),
        ("clip", {"digit": 3}, "without a generator"),
        ("about", b"[1]", "a request is a JSON object"),
        ("about", b"{", "Expecting"),
    ],
)
def test_wrong_requests_get_a_sentence(url, panel, chosen, said):
    status, told = ask(url, panel, chosen)
    assert status == 400 and said in told["error"]


def test_requests_from_other_pages_and_large_ones_are_refused(url):
    assert ask(url, "about", {}, kind="text/plain")[0] == 415
    connection = HTTPConnection(url.split("/")[2])
    connection.putrequest("POST", "/about")
    connection.putheader("Content-Length", str(3 << 20))
    connection.endheaders()
    assert connection.getresponse().status == 413


def test_models_of_other_images_are_refused(monkeypatch):
    def opened(name):
        model = torch.nn.Identity()
        model.num_classes = 10
        return OpenedModel(model, name, None, {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5)})

    monkeypatch.setattr("foveal.zoo.demo.panels.open_model", opened)
    with pytest.raises(ValueError, match=r"colours takes RGB images.*grey images of ten digits"):
        Panels("colours").about()


THREE = [
    (0.3, 0.2),
    (0.5, 0.12),
    (0.68, 0.25),
    (0.62, 0.42),
    (0.45, 0.48),
    (0.65, 0.55),
    (0.7, 0.75),
    (0.5, 0.88),
    (0.28, 0.8),
]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "touch"), [(1280, False), (390, True)], ids=["desk", "phone"])
def test_page_in_a_browser(width, touch, tmp_path):
    """A drawn three is named, a digit moves, a window of 5 shows 25 keys, and nothing is wider than a phone."""
    if not (shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("google-chrome"))):
        pytest.skip("chromium and chromedriver are not installed")
    with make_server(Panels()) as server, browser(width, 844, touch=touch) as page:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.open(server.url)
        page.wait(lambda: page.run("return document.querySelectorAll('#layer option').length") == 5)
        page.drag("#pad", THREE)
        page.wait(lambda: page.text("#named"))
        assert page.text("#named") == "It is a 3."
        assert "token 4, 4 of 8×8" in page.text("#attention-note")
        page.drag("#attention", [(0.1, 0.9), (0.1, 0.9)])
        page.wait(lambda: "token 7, 0 of 8×8" in page.text("#attention-note"))
        page.click("#digits button:nth-child(8)")
        page.wait(lambda: page.run("return document.getElementById('gif').naturalWidth") > 0)
        assert "8 frames of 32×32 pixels" in page.text("#clip-note")
        page.run("const w = document.getElementById('window'); w.value = 5; w.dispatchEvent(new Event('input'))")
        page.wait(lambda: "25 of 576" in page.text("#facts"))
        assert page.run("return document.documentElement.scrollWidth") <= width
        assert not page.run("return [...document.querySelectorAll('.error')].map(e => e.textContent).join('')")
        page.click("#clear")
        assert page.text("#named") == ""
        page.screenshot(tmp_path / "page.png")
        server.shutdown()
