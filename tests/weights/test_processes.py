"""`fetch` in processes of its own: killed, two at once, on a full disk, in a cache it may not write."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import stat
import tempfile
import time
from pathlib import Path

import pytest
import torch
from foveal.weights import fetch, load_manifest
from safetensors.torch import save
from weights_server import QUICK, fetch_in_a_process, serve, write_manifest

pytest.importorskip("resource", reason="needs file size limits and permission bits")
NAME = "natten_test_m.tag"
CONTENT = save({"weight": torch.arange(500_000, dtype=torch.float32)})
DIGEST = hashlib.sha256(CONTENT).hexdigest()

# Processes are forked from one that has imported torch already, which takes longer than all that they do.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["foveal.weights"])


@pytest.fixture
def folder(monkeypatch):
    """A folder that any user may enter, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="foveal-test-"))
    path.chmod(0o755)
    monkeypatch.setenv("FOVEAL_HOME", str(path / "home"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("FOVEAL_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield path
    for inner in [path, *path.rglob("*")]:
        if inner.is_dir():
            inner.chmod(stat.S_IRWXU)
    shutil.rmtree(path)


@pytest.fixture
def origin():
    with serve() as origin:
        yield origin


@pytest.fixture
def start(origin, folder):
    """Starts a process that fetches the one file of the server's /w."""
    processes = []
    write_manifest(folder / "manifest.json", {"url": f"{origin.url}/w", "sha256": DIGEST})
    (folder / "manifest.json").chmod(0o644)

    def start(*names, limit=0, unprivileged=False):
        answers, end = CONTEXT.Pipe()
        environment = {key: os.environ[key] for key in ("FOVEAL_HOME", "NO_PROXY")}
        arguments = (end, environment, folder / "manifest.json", names or [NAME], limit, unprivileged)
        process = CONTEXT.Process(target=fetch_in_a_process, args=arguments)
        process.start()
        end.close()
        processes.append(process)
        assert answer(answers) == "ready"
        return process, answers

    yield start
    for process in processes:
        process.kill()
        process.join()


def answer(answers):
    assert answers.poll(60), "waited for a minute"
    return answers.recv()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.01)


def test_killed_in_the_middle_and_resumed(origin, start, folder):
    half = len(CONTENT) // 2
    served = origin.add("/w", CONTENT, stall_after=half)
    partial = folder / "home" / "weights" / NAME / "model.safetensors.partial"
    process, _ = start()
    wait_until(lambda: partial.exists() and partial.stat().st_size >= half - (1 << 16))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = partial.stat().st_size
    assert 0 < kept <= half and not partial.with_suffix("").exists()
    served.stall_after = None
    served.go_on.set()
    path = fetch(NAME, manifest=load_manifest(folder / "manifest.json"), transfer=QUICK)
    assert path.read_bytes() == CONTENT and not partial.exists()
    assert origin.requests[-1][2] == f"bytes={kept}-" and origin.gets == 2


def test_two_processes_download_once(origin, start, folder):
    served = origin.add("/w", CONTENT, stall_after=1000)
    processes = [start(), start()]
    wait_until(lambda: origin.gets > 0)
    time.sleep(0.3)  # the other one is past its look into the cache by now, and waits for the first
    assert not any(answers.poll() for _, answers in processes)
    served.go_on.set()
    path = folder / "home" / "weights" / NAME / "model.safetensors"
    assert [answer(answers) for _, answers in processes] == [f"path {path}"] * 2
    assert origin.gets == 1 and origin.body_bytes == len(CONTENT) and path.read_bytes() == CONTENT


def test_a_full_disk_leaves_no_broken_file(origin, start, folder):
    origin.add("/w", CONTENT)
    _, answers = start(limit=300_000)
    message = answer(answers)  # writes beyond it fail as they do on a full disk
    assert message.startswith("error could not fetch") and "no space left" in message and "FOVEAL_HOME" in message
    assert [path.name for path in (folder / "home" / "weights" / NAME).iterdir()] == [".lock"]


def test_a_read_only_cache_serves_hits_and_refuses_misses(origin, start, folder):
    """Root ignores permission bits, so the process becomes nobody when the tests run as root."""
    origin.add("/w", CONTENT)
    path = fetch(NAME, manifest=load_manifest(folder / "manifest.json"), transfer=QUICK)
    path.with_name(f"{path.name}.stamp").unlink()  # the harder case: to be hashed, and the stamp cannot be written
    cache = folder / "home" / "weights"
    for inner in (folder / "home", cache, cache / NAME, path):
        inner.chmod(inner.stat().st_mode & ~0o222)
    entries = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(entries | {"natten_test_m.other": entries[NAME]}))
    _, answers = start(NAME, "natten_test_m.other", unprivileged=True)
    hit, miss = answer(answers), answer(answers)
    assert hit == f"path {path}"
    expected = f"error natten_test_m.other has to be fetched, but {cache / 'natten_test_m.other'} cannot be written"
    assert miss.startswith(expected) and "FOVEAL_HOME" in miss
    assert origin.gets == 1
