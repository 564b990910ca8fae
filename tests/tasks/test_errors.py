"""One place for errors: which become a sentence with their path, which keep their traceback, and whose."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from foveal import train
from foveal.weights import WeightsError
from foveal.zoo.data.foreign import about, reason
from foveal.zoo.tasks.checkpoint import AtomicCheckpointIO, read_checkpoint, replacing, writing_to
from foveal.zoo.tasks.explain import PACKAGE, JobError, Remote, explain, one_sentence
from foveal.zoo.tasks.launch import check_writable
from foveal.zoo.tasks.record import starts_of
from torch._utils import ExceptionWrapper
from torch.multiprocessing.spawn import ProcessRaisedException
from train_helpers import assert_one_sentence, configure


def raised_in(file: str, source: str) -> BaseException:
    """The error of code that stands in a file, with that file's lines in its traceback."""
    import linecache

    linecache.cache[file] = (len(source), None, [f"{line}\n" for line in source.splitlines()], file)
    try:
        exec(compile(source, file, "exec"), {})
    except Exception as error:
        return error
    raise AssertionError(source)


OUR_RAISE = "raise ValueError('data.root=7 is wrong:\\nsee the page')"


@pytest.mark.parametrize(
    ("file", "source", "sentence"),
    [
        ("zoo/tasks/launch.py", OUR_RAISE, "data.root=7 is wrong:"),
        ("train.py", OUR_RAISE, "data.root=7 is wrong:"),
        ("zoo/tasks/launch.py", "len(None)", None),
        ("zoo/tasks/launch.py", "raise RuntimeError('a fault')", None),
        (".venv/lib/python3.12/site-packages/PIL/ImageOps.py", OUR_RAISE, None),
        ("venv/lib64/python3.11/site-packages/torch/x.py", OUR_RAISE, None),
        ("build/lib/foveal/zoo/x.py", OUR_RAISE, None),
        ("my_script.py", OUR_RAISE, None),
        ("/somewhere/else/zoo/x.py", OUR_RAISE, None),
    ],
)
def test_only_checks_of_this_package_become_sentences(file, source, sentence):
    error = raised_in(str(PACKAGE / file), source)
    assert explain(error) == sentence
    wrapped = ExceptionWrapper((type(error), error, error.__traceback__), where="in DataLoader worker process 1")
    with pytest.raises(type(error)) as raised:
        wrapped.reraise()
    assert explain(raised.value) == sentence


def test_errors_of_other_processes_are_unwrapped(capsys, monkeypatch):
    monkeypatch.setenv("FOVEAL_ONE_SENTENCE", "1")
    error = raised_in(
        "/site-packages/PIL/x.py", "def posterize(bits):\n    raise ValueError('bits must be 1 to 8')\nposterize(0)"
    )
    wrapped = ExceptionWrapper((type(error), error, error.__traceback__), where="in DataLoader worker process 3")
    with pytest.raises(SystemExit) as stopped, one_sentence():
        wrapped.reraise()
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("In DataLoader worker process 3:\nTraceback") and said.endswith(
        "ValueError: bits must be 1 to 8\n"
    )
    assert "in posterize" in said and "Caught" not in said
    trace = wrapped.exc_msg.partition("Original ")[2] or wrapped.exc_msg
    spawned = ProcessRaisedException(f"\n\n-- Process 1 terminated with the following error:\n{trace}", 1, 7)
    remote = Remote.of(spawned)
    assert remote.where == "Process 1" and (remote.kind, remote.message) == ("ValueError", "bits must be 1 to 8")
    assert Remote.of(ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback …")) is None


def test_files_that_cannot_be_used_are_named_whoever_found_out():
    path = "/data/cat 1.jpg"
    for number in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG):
        error = OSError(number, os.strerror(number), path)
        assert explain(error) == f"{path} cannot be used: {os.strerror(number)}"
        wrapped = ExceptionWrapper((type(error), error, None), where="in DataLoader worker process 0")
        wrapped.exc_msg = "Traceback (most recent call last):\n" + '  File "/x.py", line 1, in f\n    open()\n'
        wrapped.exc_msg += f"{type(error).__name__}: {error}\n"
        with pytest.raises(OSError) as raised:
            wrapped.reraise()
        assert explain(raised.value) == f"{os.strerror(number)}: '{path}'"
    assert explain(FileNotFoundError(errno.ENOENT, "No such file", "/lib/x.so")) is None


def test_the_first_failure_on_a_full_disk_is_told(tmp_path):
    target = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, target)
    kept = target.read_bytes()
    target.with_name("last.ckpt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError) as full:
        try:
            AtomicCheckpointIO().save_checkpoint({"a": torch.ones(300_000)}, target)
        finally:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "log.csv"))
    assert explain(full.value) == (
        f"no space is left to write {target} (No space left on device): free some, then go on with ckpt_path=auto"
    )
    assert [path.name for path in target.parent.iterdir()] == ["last.ckpt"] and target.read_bytes() == kept
    with pytest.raises(OSError) as nameless, writing_to(tmp_path):
        Path("/dev/full").write_text("x" * 10_000)
    assert explain(nameless.value).startswith(f"no space is left to write {tmp_path} (")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "metrics.csv"
    with replacing(path) as partial:
        partial.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def damaged(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = folder / "whole.ckpt"
    torch.save({"model": torch.zeros(1000)}, whole)
    content = whole.read_bytes()
    for name, data in (("empty", b""), ("cut", content[:2000]), ("text", b"epoch,step\n")):
        (folder / name).write_bytes(data)
    torch.save({"state_dict": {}, "hyper_parameters": Path("x")}, folder / "code")
    torch.save([1, 2], folder / "list")
    (folder / "folder").mkdir()
    last = folder / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(content)
    return {
        "empty": (folder / "empty", "cannot be read: it is empty"),
        "cut": (folder / "cut", "cannot be read: it is cut short, or no file of torch.save"),
        "text": (folder / "text", "cannot be read: it is cut short"),
        "code": (folder / "code", "cannot be read: it holds more than tensors and plain values"),
        "list": (folder / "list", "is no checkpoint of a training run"),
        "foreign": (whole, "it has no pytorch-lightning_version, state_dict, loops"),
        "folder": (folder / "folder", "is a folder: expected a file such as RUN/checkpoints/last.ckpt"),
        "run": (folder / "run", f"is a folder: pass ckpt_path={last}"),
        "gone": (folder / "gone", "cannot be read: No such file or directory"),
    }


def test_what_is_no_checkpoint_is_named(tmp_path):
    for name, (path, sentence) in damaged(tmp_path).items():
        with pytest.raises(ValueError) as refused:
            read_checkpoint(path)
        assert str(refused.value).startswith(f"ckpt_path={str(path)!r} ") and sentence in str(refused.value), name
        assert explain(refused.value) == str(refused.value), name


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "environment.json").write_text('[{"command": "tr')
    with pytest.raises(ValueError, match=r"environment\.json='.*' cannot be read: Unterminated string"):
        starts_of(tmp_path)
    (tmp_path / "environment.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"is no list of starts: remove it"):
        starts_of(tmp_path)


def test_reasons_are_short():
    assert reason(OSError(errno.EIO, "Input/output error", "/x")) == "Input/output error"
    assert reason(ValueError("\n first\nsecond")) == "first" and reason(KeyError()) == "KeyError"
    with (
        pytest.raises(ValueError, match=r"^data\.captions='a\.csv' cannot be read: bad line$"),
        about("data.captions", "a.csv", KeyError, OSError),
    ):
        raise OSError("bad line")
    with pytest.raises(LookupError, match="other"), about("data.captions", "a.csv", OSError):
        raise LookupError("other")


def test_folders_that_cannot_be_written_are_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for folder in (tmp_path / "file" / "run", Path("/proc/run"), tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=r"^run_dir='.*' cannot be written: \w+"):
            check_writable(folder)


def test_weights_that_cannot_be_had_are_told_before_training(tmp_path, monkeypatch):
    pretrained = configure(tmp_path, "model.pretrained=true")
    _, task, _ = train.build(configure(tmp_path))
    task.model, task.model_cfg = None, dict(pretrained.model)

    def fails(error: Exception):
        def create_model(*args, **kwargs):
            raise error

        monkeypatch.setattr(timm, "create_model", create_model)
        return pytest.raises(type(error) if isinstance(error, WeightsError) else ValueError)

    for error in (OSError("We couldn't connect\nto the hub"), RuntimeError("Error(s) in loading state_dict")):
        with fails(error) as refused:
            task.configure_model()
        args = dict(pretrained.model.args) | {"num_classes": 10, "in_chans": 1}
        assert explain(refused.value).endswith(f"with pretrained=True and model.args={args}: {reason(error)}")
    with fails(WeightsError("natten_dinat_m is not in the cache")) as refused:
        task.configure_model()
    assert explain(refused.value) == "natten_dinat_m is not in the cache"


def test_a_failed_job_names_the_table_that_is_there(tmp_path):
    table = tmp_path / "comparison.csv"
    error = JobError("job 1 failed", table=table, status=2)
    assert explain(error) == "job 1 failed"
    table.write_text("")
    assert explain(error) == f"job 1 failed; what the others measured is in {table}"


def test_a_yaml_that_is_none_is_named_with_its_line(tmp_path, monkeypatch, capsys):
    experiment = tmp_path / "experiment" / "mine.yaml"
    experiment.parent.mkdir()
    experiment.write_text("# @package _global_\nname: mine\ndata: {root: x\n")
    arguments = ["--config-dir", str(tmp_path), "experiment=mine"]
    assert_one_sentence(arguments, "mine.yaml, line 4 is no YAML: expected ',' or '}'", monkeypatch, capsys)
    assert sys.argv[1] == "--config-dir"
