"""`foveal` as a process of its own: it starts lightly, and leads from images to a model in use."""

import json
import signal
import subprocess
import sys
import urllib.request
from functools import partial

import pytest
from image_folders import photograph_digits
from PIL import Image

LIGHT = """
import sys
from foveal.cli import app
try:
    app(["weights", "list", "pico"], prog_name="foveal")
except SystemExit as end:
    assert end.code == 0
print(*sorted(name for name in HEAVY if name in sys.modules))
"""


def process(*arguments, code: int = 0, cwd=None) -> subprocess.CompletedProcess:
    """The command, run as a process, which ends with this exit status."""
    command = [sys.executable, "-m", "foveal.cli", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert run.returncode == code, run.stdout + run.stderr
    return run


def test_listing_weights_imports_little():
    heavy = ("timm", "torchvision", "lightning", "diffusers", "matplotlib", "hydra", "foveal.zoo")
    run = subprocess.run([sys.executable, "-c", LIGHT.replace("HEAVY", str(heavy))], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *listed, found = run.stdout.splitlines()
    assert "natten_dinat_pico.digits" in "\n".join(listed) and found == ""


def test_a_mistake_is_one_sentence_and_status_2(tmp_path):
    run = process("export", "run", tmp_path / "model.pb", "--format", "onnx", code=2)
    assert run.stderr.startswith("foveal: error: ") and run.stderr.count("\n") == 1 and not run.stdout


@pytest.mark.slow
def test_explain_and_profile():
    words = ("--shape", 28, 28, "--heads", 2, "--head-dim", 32, "--window", 7, "--device", "cuda")
    assert "na2d of (1, 28, 28, 2, 32)" in process("explain", "--op", "na2d", *words).stdout
    assert "invalid choice" in process("explain", "--op", "na9", *words, code=2).stderr
    told = json.loads(process("profile", "natten_dinat_pico", "--repeats", 1, "--json").stdout)
    assert told["img_size"] == 32
    process("plot", "field", "9,9", "--window", 3, "-o", "/dev/null/field.png", code=2)


@pytest.mark.slow
def test_the_digits_of_the_package_are_sampled_anywhere(tmp_path):
    words = ("sample", "digits", "digits.gif", "-c", 3, "-c", 7, "--steps", 4, "--json")
    told = json.loads(process(*words, cwd=tmp_path).stdout)
    assert told == {"files": ["digits.gif"], "clips": 2, "captions": ["3", "7"]}
    with Image.open(tmp_path / "digits.gif") as shown:
        assert shown.n_frames == 8
    assert "ten" in process("sample", "digits", "a.gif", "-c", "ten", code=2, cwd=tmp_path).stderr


@pytest.mark.slow
def test_demo_serves_until_it_is_interrupted():
    command = [sys.executable, "-m", "foveal.cli", "demo", "--no-open", "--port", "0", "--generator", "none"]
    # a shell that started the tests in the background made them deaf to SIGINT, and what they start with them
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=hears) as run:
        try:
            assert run.stdout is not None
            with urllib.request.urlopen(run.stdout.readline().split()[0]) as answer:
                assert b"Draw a digit" in answer.read()
            run.send_signal(signal.SIGINT)
            assert run.wait(60) == 0
        finally:
            run.kill()
    assert "cannot be listened at" in process("demo", "--no-open", "--host", "203.0.113.1", code=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize("model", ["natten_dinat_pico"])
def test_from_images_to_a_model_in_use(model, tmp_path):
    """Train, evaluate, predict, export in every format, and evaluate what was exported: the same numbers."""
    onnxruntime = pytest.importorskip("onnxruntime")
    data = photograph_digits(tmp_path / "data")
    options = ("data.img_size=32", "data.batch_size=16", "data.train_transform.hflip=0", "task.optimizer.lr=2e-3")
    options += ("threads=1", "trainer.max_epochs=6", "data.num_workers=0", "trainer.accelerator=cpu")
    process(
        "train",
        "experiment=finetune",
        f"data.root={data}",
        f"model.name={model}",
        *options,
        "run_dir=run",
        cwd=tmp_path,
    )
    told = json.loads(process("eval", "run", data, "--out", "ev", "--json", cwd=tmp_path).stdout)
    assert told["num_images"] == 160 and told["top1"] > 60
    process("export", "run", "flowers", cwd=tmp_path)
    again = json.loads(process("eval", "flowers", data / "val", "--out", "again", "--json", cwd=tmp_path).stdout)
    assert again == told
    names = json.loads(process("predict", "flowers", data / "val", "--json", cwd=tmp_path).stdout)
    right = sum(entry["top"][0]["name"] in entry["file"] for entry in names)
    assert 100 * right / 160 == told["top1"]
    made = json.loads(process("export", "flowers", "model.onnx", "--json", cwd=tmp_path).stdout)
    assert made["dynamic"] == "size" and made["difference"] < 1e-4
    metadata = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert "seven" in json.loads(metadata["class_names"])
    made = json.loads(process("export", "flowers", "model.pt2", "--json", cwd=tmp_path).stdout)
    # at 32 pixels the last stage is a single window, and the program is guarded to keep it one
    assert made["dynamic"] == "batch" and made["difference"] < 1e-4
