"""The command line `foveal weights …`."""

import argparse
import json
import re

import pytest
import torch
from foveal.weights import bundled_manifest, load
from foveal.weights.cli import app
from safetensors import safe_open
from safetensors.torch import save
from typer.testing import CliRunner
from weights_server import serve, write_manifest

NAME = "natten_test_m.tag"
STATE = {"weight": torch.arange(400, dtype=torch.float32)}
CONTENT = save(STATE)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FOVEAL_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def origin():
    with serve() as origin:
        origin.add("/w", CONTENT)
        yield origin


@pytest.fixture
def manifest(tmp_path, origin):
    write_manifest(tmp_path / "manifest.json", {"url": f"{origin.url}/w"}, metrics={"top1": 81.25})
    return str(tmp_path / "manifest.json")


def run(*arguments):
    return CliRunner().invoke(app, ["weights", *map(str, arguments)])


def test_list_shows_every_entry_with_license_and_accuracy():
    result = run("list")
    assert result.exit_code == 0
    for entry in bundled_manifest().entries.values():
        line = next(line for line in result.output.splitlines() if line.split()[:1] == [entry.name])
        assert entry.license in line and f"{entry.metrics.get('top1', '–')}" in line
    assert f"{len(bundled_manifest().entries)} weights; cache: " in result.output


def test_list_filters_and_knows_what_is_cached(manifest):
    assert re.search(rf"{NAME} +\? +MIT +81\.25 +–", run("list", "--manifest", manifest).output)
    assert run("fetch", NAME, "--manifest", manifest, "--loopback-http").exit_code == 0
    assert re.search(rf"{NAME} +1\.7 kB +MIT +81\.25 +yes", run("list", "test_m", "--manifest", manifest).output)
    assert NAME not in run("list", "dinat", "--manifest", manifest).output


def test_list_estimates_sizes_that_are_not_published(tmp_path):
    write_manifest(tmp_path / "m.json", {"url": "https://example.org/w", "bytes": 2_345_678}, params=99)
    assert re.search(r" 2\.3 MB +MIT", run("list", "--manifest", tmp_path / "m.json").output)
    write_manifest(tmp_path / "m.json", {"url": "https://example.org/w"}, params=19_984_174)
    said = run("list", "--manifest", tmp_path / "m.json").output
    assert re.search(r" ~80 MB +MIT", said) and "~: parameters in float32" in said
    (row,) = json.loads(run("list", "--json", "--manifest", tmp_path / "m.json").output)
    assert (row["bytes"], row["params"]) == (None, 19_984_174)


def test_list_as_json():
    result = run("list", "natten_dinat_s.", "--json")
    (row,) = json.loads(result.output)
    assert row["name"] == "natten_dinat_s.shi_in1k" and row["top1"] == 83.8 and row["cached"] == ""


def test_fetch_prints_the_path_then_uses_the_cache(origin, manifest, home):
    path = home / "weights" / NAME / "model.safetensors"
    for _ in range(2):
        result = run("fetch", NAME, "--manifest", manifest, "--loopback-http")
        assert (result.exit_code, result.output) == (0, f"{path}\n")
    assert origin.gets == 1 and path.read_bytes() == CONTENT
    assert run("fetch", NAME, "--manifest", manifest, "--offline").output == f"{path}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["natten_dinat_s"], r"did you mean natten_dinat_s\.shi_in1k\?"),
        (["../x"], "is not a weights name"),
        (["natten_dinat_s.shi_in1k", "--offline"], "offline mode is on"),
        (["natten_dinat_s.shi_in1k", "--format", "jax"], "no file of format 'jax'"),
        (["a.b", "--manifest", "/nowhere/m.json"], "cannot read the weights manifest"),
    ],
)
def test_fetch_errors_are_one_sentence_and_exit_with_1(arguments, message):
    result = run("fetch", *arguments)
    assert result.exit_code == 1
    assert re.match(f"error: .*{message}", result.stderr) and result.stderr.count("\n") == 1 and result.stdout == ""


def test_fetch_over_http_needs_the_hidden_opt_in(manifest, origin):
    result = run("fetch", NAME, "--manifest", manifest)
    assert result.exit_code == 1 and "expected https, got http" in result.stderr and origin.requests == []


def test_verify(manifest, home):
    assert run("verify", "--manifest", manifest).exit_code == 0  # nothing is cached, nothing is wrong
    result = run("verify", NAME, "--manifest", manifest)
    assert result.exit_code == 1 and result.stdout == f"missing   {NAME}\n"
    run("fetch", NAME, "--manifest", manifest, "--loopback-http")
    result = run("verify", "--manifest", manifest)
    assert (result.exit_code, result.stdout) == (0, f"verified  {NAME} model.safetensors\n")
    path = home / "weights" / NAME / "model.safetensors"
    damaged = bytearray(CONTENT)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    for arguments in ([], [NAME]):
        result = run("verify", *arguments, "--manifest", manifest)
        assert result.exit_code == 1 and result.stdout.startswith(f"corrupt   {NAME} model.safetensors its SHA-256 is")
        assert result.stderr.count("\n") == 1 and "1 of these are damaged or missing" in result.stderr


def test_verify_hashes_files_that_look_unchanged(manifest, home):
    run("fetch", NAME, "--manifest", manifest, "--loopback-http")
    path = home / "weights" / NAME / "model.safetensors"
    stamp = json.loads(path.with_name("model.safetensors.stamp").read_text())
    damaged = bytearray(CONTENT)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    stamp["mtime_ns"] = path.stat().st_mtime_ns
    path.with_name("model.safetensors.stamp").write_text(json.dumps(stamp))
    assert run("verify", "--manifest", manifest).exit_code == 1


def test_convert(tmp_path):
    torch.save({"epoch": 1, "model": STATE, "teacher": {"weight": torch.zeros(400)}}, tmp_path / "m.pth")
    result = run("convert", tmp_path / "m.pth", tmp_path / "m.safetensors")
    assert (result.exit_code, result.output) == (0, f"{tmp_path / 'm.safetensors'}: 1 tensors, 1.7 kB\n")
    torch.testing.assert_close(load(tmp_path / "m.safetensors"), STATE, rtol=0, atol=0)
    again = run("convert", tmp_path / "m.pth", tmp_path / "m.safetensors", "--container", "teacher")
    assert again.exit_code == 1 and "exists; pass --force" in again.stderr
    forced = run("convert", tmp_path / "m.pth", tmp_path / "m.safetensors", "--container", "teacher", "--force")
    assert forced.exit_code == 0 and not load(tmp_path / "m.safetensors")["weight"].any()


def test_convert_a_training_checkpoint(tmp_path):
    config = {"architecture": "resnet18", "num_classes": 2, "label_names": ["cat", "dög"]}
    raw = {"model.weight": STATE["weight"] + 1}
    checkpoint = {"pytorch-lightning_version": "2.6", "state_dict": raw, "hyper_parameters": {"lr": 0.1}}
    torch.save(checkpoint | {"state_dict_ema": STATE, "timm_config": config}, tmp_path / "last.ckpt")
    target = tmp_path / "m.safetensors"
    assert run("convert", tmp_path / "last.ckpt", target).exit_code == 0
    torch.testing.assert_close(load(target), STATE, rtol=0, atol=0)
    with safe_open(target, "pt") as file:
        said = file.metadata()
    assert said.pop("converted_from") == "last.ckpt" and said.pop("format") == "pt"
    assert json.loads(said.pop("label_names")) == ["cat", "dög"]
    assert said == {"architecture": "resnet18", "num_classes": "2"}
    assert run("convert", tmp_path / "last.ckpt", target, "--container", "state_dict", "--force").exit_code == 0
    torch.testing.assert_close(load(target)["weight"], raw["model.weight"], rtol=0, atol=0)


def test_text_of_users_is_no_markup(tmp_path, monkeypatch):
    folder = tmp_path / "[bold]x[/]"
    result = run("list", "pico", "--cache-dir", folder)
    assert result.exit_code == 0 and f"cache: {folder}\n" in result.output
    result = run("convert", folder / "m.pth", folder / "m.safetensors")
    assert result.exit_code == 1 and str(folder / "m.pth") in result.stderr
    write_manifest(tmp_path / "m.json", {"url": "https://example.org/w"}, license="MIT [red](own)[/red] :smile:")
    assert "MIT [red](own)[/red] :smile:" in run("list", "--manifest", tmp_path / "m.json").output


@pytest.mark.parametrize(
    ("content", "target", "message"),
    [
        (
            {"args": argparse.Namespace(lr=1), **STATE},
            "m.safetensors",
            "refused: its pickle asks for argparse.Namespace",
        ),
        ({"step": 1}, "m.safetensors", "more than named tensors"),
        (STATE, "m.pth2", "expected '.safetensors'"),
        (STATE, "nowhere/m.safetensors", "cannot write weights"),
    ],
)
def test_convert_errors(tmp_path, content, target, message):
    torch.save(content, tmp_path / "m.pth")
    result = run("convert", tmp_path / "m.pth", tmp_path / target)
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


def test_wrong_usage_exits_with_2():
    assert run("fetch").exit_code == 2
    assert run("fetsch").exit_code == 2
    assert run("convert", "only-one").exit_code == 2
