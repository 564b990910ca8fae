"""Reading weights: what is accepted, what is refused, and that nothing is ever run."""

import argparse
import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from foveal.weights import WeightsError, check_state_dict, load, save
from safetensors.torch import save as to_bytes

STATE = OrderedDict(
    {
        "stem.weight": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
        "stem.half": torch.ones(3, dtype=torch.bfloat16),
        "index": torch.arange(4),
        "flag": torch.tensor(True),
    }
)


class Payload:
    """Writes a file when a plain unpickler reads it."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.write_text, (self.victim, "executed")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_every_kind_of_file(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    save(STATE, path) if suffix == ".safetensors" else torch.save(STATE, path)
    loaded = load(path)
    assert loaded.keys() == STATE.keys()
    torch.testing.assert_close(loaded, dict(STATE), rtol=0, atol=0)
    assert all(loaded[key].dtype == STATE[key].dtype for key in STATE)


def test_the_format_before_zip(tmp_path):
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(load(tmp_path / "old.pth"), dict(STATE), rtol=0, atol=0)


def test_parameters_become_plain_tensors(tmp_path):
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "m.pth")
    loaded = load(tmp_path / "m.pth")["w"]
    assert type(loaded) is torch.Tensor and not loaded.requires_grad


@pytest.mark.parametrize("key", ["model", "state_dict", "state_dict_ema", "model_ema"])
def test_containers_are_found(tmp_path, key):
    torch.save({"epoch": 3, key: STATE, "optimizer": {"lr": 0.1}}, tmp_path / "m.pth")
    assert load(tmp_path / "m.pth").keys() == STATE.keys()
    assert load(tmp_path / "m.pth", container=key).keys() == STATE.keys()


def test_averaged_weights_go_first_and_the_name_decides(tmp_path):
    torch.save({"model": {"w": torch.zeros(1)}, "state_dict_ema": {"w": torch.ones(1)}}, tmp_path / "m.pth")
    assert load(tmp_path / "m.pth")["w"] == 1
    assert load(tmp_path / "m.pth", container="model")["w"] == 0


def test_a_parameter_called_model_is_no_container(tmp_path):
    torch.save({"model": torch.ones(2), "w": torch.ones(1)}, tmp_path / "m.pth")
    assert load(tmp_path / "m.pth").keys() == {"model", "w"}


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({"a": STATE}, {"container": "model"}, r"no container 'model'; it holds a"),
        ({"weird": STATE, "step": 3}, {}, r"more than named tensors: 'weird' \(OrderedDict\), 'step' \(int\)"),
        ({"model": {"w": [1, 2]}}, {}, r"more than named tensors: 'w' \(list\)"),
        ({3: torch.ones(1)}, {}, r"more than named tensors: 3 \(Tensor\)"),
        (torch.ones(2), {}, "holds Tensor; expected a mapping"),
        ([torch.ones(2)], {"container": "model"}, "no container 'model'; it holds list"),
    ],
)
def test_what_is_not_a_state_dict(tmp_path, content, arguments, message):
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(WeightsError, match=message):
        load(tmp_path / "m.pth", **arguments)


@pytest.mark.parametrize("file", ["m.npz", "m.pkl", "m.zip", "m.tar", "m"])
def test_other_suffixes_are_refused_unread(tmp_path, file):
    (tmp_path / file).write_bytes(pickle.dumps(Payload(tmp_path / "victim")))
    with pytest.raises(WeightsError, match=r"suffix is .*expected one of \.safetensors, \.pth, \.pt, \.bin"):
        load(tmp_path / file)
    assert not (tmp_path / "victim").exists()


def test_a_missing_file(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        load(tmp_path / "m.pth")


@pytest.mark.parametrize("file", ["m.ckpt", "m.PTH", "m.pth.tar", "M.Bin"])
def test_suffixes_of_pytorch_files(tmp_path, file):
    torch.save(STATE, tmp_path / file)
    torch.testing.assert_close(load(tmp_path / file), dict(STATE), rtol=0, atol=0)
    torch.save(Payload(tmp_path / "victim"), tmp_path / file)
    with pytest.raises(WeightsError, match="is refused: its pickle asks for"):
        load(tmp_path / file)
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_names_are_those_of_the_model(tmp_path, prefix):
    """Not those of what stood around it; `model.` alone may be the model's own."""
    torch.save({"state_dict": {prefix + key: value for key, value in STATE.items()}}, tmp_path / "m.pth")
    expected = [f"model.{key}" for key in STATE] if prefix == "model." else list(STATE)
    assert list(load(tmp_path / "m.pth")) == expected


def test_names_of_modules_that_were_wrapped_one_by_one(tmp_path):
    wrapped = {f"0.{name}.weight": torch.ones(1) for name in ("_orig_mod", "_fsdp_wrapped_module.attn")}
    torch.save(wrapped | {"1._checkpoint_wrapped_module.bias": torch.ones(1)}, tmp_path / "m.pth")
    assert list(load(tmp_path / "m.pth")) == ["0.weight", "0.attn.weight", "1.bias"]


def test_the_average_that_torch_keeps(tmp_path):
    model = torch.nn.Linear(2, 2)
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), tmp_path / "m.pth")
    assert list(load(tmp_path / "m.pth")) == list(model.state_dict())


def test_a_parameter_called_module_stays(tmp_path):
    torch.save({"module.w": torch.ones(1), "head.w": torch.ones(1)}, tmp_path / "m.pth")
    assert list(load(tmp_path / "m.pth")) == ["module.w", "head.w"]


def test_checkpoints_of_lightning(tmp_path):
    """The model that the module keeps as `model`; without one all that is there."""
    version = {"pytorch-lightning_version": "2.6"}
    weights = {"loss.weight": torch.zeros(1), "model.w": torch.ones(1), "model._orig_mod.b": torch.ones(2)}
    raw = {key: value + 1 for key, value in weights.items()}
    torch.save(version | {"state_dict": weights, "current_model_state": raw}, tmp_path / "last.ckpt")
    assert load(tmp_path / "last.ckpt").keys() == {"w", "b"}
    assert load(tmp_path / "last.ckpt", container="current_model_state")["w"] == 2
    torch.save(version | {"state_dict": {"net.w": torch.ones(1)}}, tmp_path / "last.ckpt")
    assert load(tmp_path / "last.ckpt").keys() == {"net.w"}
    averaged = {"state_dict_ema": {"model.inner": torch.ones(1)}, "state_dict": weights}
    torch.save(version | averaged, tmp_path / "last.ckpt")
    assert load(tmp_path / "last.ckpt").keys() == {"model.inner"}, "these are the model's own names already"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it is a folder; expected a file"),
        (b"", "the file is empty"),
        (b"\n <!DOCTYPE html><html>log in</html>", "it holds a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "it is a Git LFS pointer"),
        (b"weights", "cut short"),
    ],
)
def test_files_that_hold_no_weights_are_told_in_one_sentence(tmp_path, suffix, content, message):
    path = tmp_path / f"m [x]{suffix}"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_that_holds_weights_is_pointed_into(tmp_path):
    save(STATE, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"did you mean {tmp_path / 'model.safetensors'}\?"):
        load(tmp_path)


def test_files_with_the_suffix_of_the_other_format(tmp_path):
    save(STATE, tmp_path / "m.safetensors").rename(tmp_path / "m.pth")
    with pytest.raises(WeightsError, match=r"it holds safetensors; rename it to \.safetensors"):
        load(tmp_path / "m.pth")
    torch.save(STATE, tmp_path / "n.safetensors")
    with pytest.raises(WeightsError, match=r"it holds a PyTorch file; rename it to \.pth"):
        load(tmp_path / "n.safetensors")


def test_refusals_without_zip_name_the_object_too(tmp_path):
    torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"pickle asks for argparse\.Namespace, and only tensors are accepted"):
        load(tmp_path / "m.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle", "nested"])
def test_a_payload_is_refused_and_not_executed(tmp_path, suffix, writer):
    victim, path = tmp_path / "victim", tmp_path / f"evil{suffix}"
    content = {"model": OrderedDict(w=torch.ones(1), x=Payload(victim))} if writer == "nested" else Payload(victim)
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer != "legacy")
    with pytest.raises(WeightsError, match=r"refused|not a valid safetensors|cannot be read as tensors"):
        load(path)
    assert not victim.exists()
    if writer == "pickle":
        pickle.loads(path.read_bytes())
    else:
        with open(path, "rb") as file:
            torch.load(file, weights_only=False)
    assert victim.read_text() == "executed"  # the payload is a real one


def test_a_refusal_names_the_objects(tmp_path):
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1)}, tmp_path / "m.pth")
    with pytest.raises(WeightsError, match=r"pickle asks for argparse\.Namespace.*nothing in it was run"):
        load(tmp_path / "m.pth")


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for item in plain.namelist():
            bomb.writestr(item, plain.read(item))
    assert os.path.getsize(tmp_path / "bomb.pth") < 1 << 16
    with pytest.raises(WeightsError, match="compressed records"):
        load(tmp_path / "bomb.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"0", b"<html></html>", b"PK\x03\x04", b"\x80\x02", bytes(range(256)) * 40])
def test_files_of_another_kind(tmp_path, suffix, content):
    (tmp_path / f"m{suffix}").write_bytes(content)
    with pytest.raises(WeightsError, match=f"m{suffix}"):
        load(tmp_path / f"m{suffix}")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pickles(tmp_path, zipped):
    torch.save(STATE, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "m.pth").read_bytes()
    for end in range(0, len(content) - 1, 97):
        (tmp_path / "m.pth").write_bytes(content[:end])
        with pytest.raises(WeightsError):
            load(tmp_path / "m.pth")


def header(content):
    """A safetensors file with this header and no data."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 100_000_001) + b"{" + b" " * 64,  # longer than the format allows
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 1000) + b"{}",
        header(b"[" * 50_000),
        header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),  # data is missing
        header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}) + bytes(8),
        header({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}) + bytes(8),
        header({"w": {"dtype": "PYOBJECT", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}) + bytes(8),  # a hole
        header({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"}) + bytes(4),  # an overlap
        header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + bytes(4),
    ],
)
def test_malformed_safetensors(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="not a valid safetensors file"):
        load(tmp_path / "m.safetensors")


def mutate(content, rng):
    """One to four random edits: bits, bytes, digits of the header, insertions, deletions, cuts."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data)) if rng.random() < 0.3 else rng.randrange(min(len(data), 340))  # mostly the header
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice(b'0123456789[]{}",:-eF')
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 9))
        elif kind == 3:
            del data[at : at + rng.randint(1, 9)]
        elif kind == 4:
            data[:8] = struct.pack("<Q", rng.choice([0, 1, len(data), 2**31, 2**64 - 1, rng.getrandbits(16)]))
        else:
            del data[at:]
        if not data:
            return bytes(data)
    return bytes(data)


def test_ten_thousand_mutated_safetensors(tmp_path):
    """Each either raises WeightsError or still is a well-formed file of tensors; nothing else may happen."""
    content, rng, path = to_bytes(dict(STATE)), random.Random(0), tmp_path / "m.safetensors"
    refused = 0
    with open(path, "w+b", buffering=0) as file:  # opened once: truncating by name waits for the disk
        for _ in range(10_000):
            file.seek(0)
            file.truncate(file.write(mutate(content, rng)))
            try:
                assert all(isinstance(value, torch.Tensor) for value in load(path).values())
            except WeightsError:
                refused += 1
    assert 5_000 < refused < 10_000


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_five_hundred_mutated_pickles(tmp_path):
    torch.save(STATE, tmp_path / "m.pth")
    content, rng = (tmp_path / "m.pth").read_bytes(), random.Random(1)
    refused = 0
    for _ in range(500):
        (tmp_path / "m.pth").write_bytes(mutate(content, rng))
        try:
            assert all(isinstance(value, torch.Tensor) for value in load(tmp_path / "m.pth").values())
        except WeightsError:
            refused += 1
    assert refused > 100


def test_save_replaces_in_one_step_and_keeps_shared_and_strided_tensors(tmp_path):
    table = torch.arange(6.0).reshape(2, 3)
    state = {"a": table, "tied": table, "t": table.T, "part": table[:, 1]}
    path = save(state, tmp_path / "m.safetensors")
    torch.testing.assert_close(load(path), {key: value.contiguous() for key, value in state.items()})
    before = path.read_bytes()
    with pytest.raises(WeightsError, match=r"suffix is '\.pth'"):
        save(state, tmp_path / "m.pth")
    with pytest.raises(WeightsError, match="cannot write weights"):
        save(state, tmp_path / "nowhere" / "m.safetensors")
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_check_state_dict_names_every_difference():
    check_state_dict(STATE, STATE)
    check_state_dict(STATE, {key: value.shape for key, value in STATE.items()})
    check_state_dict({"w": torch.ones(2, dtype=torch.float16)}, {"w": torch.ones(2, device="meta")})
    found = {"a": torch.ones(2), "b": torch.ones(2, 3), "c": torch.ones(2), "extra": torch.ones(1)}
    wanted = {"a": torch.ones(2), "b": torch.ones(3, 2), "c": torch.ones(2, dtype=torch.int64), "gone": torch.ones(1)}
    with pytest.raises(WeightsError) as raised:
        check_state_dict(found, wanted)
    assert str(raised.value) == (
        "weights do not fit the model: missing gone; unexpected extra; b has shape (2, 3), expected (3, 2); "
        "c has dtype torch.float32, expected torch.int64"
    )
    with pytest.raises(WeightsError, match=r"^it lacks: missing k0, .*… \(12 more\)"):
        check_state_dict({}, {f"k{i}": torch.ones(1) for i in range(20)}, problem="it lacks")
