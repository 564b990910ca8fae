"""`fetch` from the Hugging Face hub: its real client against a hub on loopback."""

import hashlib
import json
import shutil

import huggingface_hub.constants
import huggingface_hub.utils
import pytest
import torch
from foveal.weights import Transfer, WeightsError, fetch
from safetensors.torch import save
from weights_server import serve, write_manifest

NAME = "natten_test_m.tag"
CONTENT = save({"weight": torch.arange(50_000, dtype=torch.float32)})
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = save({"weight": torch.arange(50_001, dtype=torch.float32)})
OLD, NEW = "1" * 40, "2" * 40
FILE = "model.safetensors"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("FOVEAL_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "home"


@pytest.fixture
def hub():
    with serve() as origin:
        yield origin


@pytest.fixture
def get(tmp_path, hub):
    def get(*mirrors, offline=False, loopback_http=True, progress=False):
        manifest = write_manifest(tmp_path / "manifest.json", *(mirrors or ({"hub": "owner/net"},)))
        transfer = Transfer(timeout=5, attempts=2, backoff=0.01, loopback_http=loopback_http, hub_endpoint=hub.url)
        return fetch(NAME, manifest=manifest, transfer=transfer, offline=offline, progress=progress)

    return get


def publish(hub, content, commit, *, branch="main", etag=None):
    """Puts a file on the hub as one commit; its ETag is the true SHA-256 unless another is given."""
    etag = hashlib.sha256(content).hexdigest() if etag is None else etag
    for revision in (commit, branch):
        url = f"/owner/net/resolve/{revision}/{FILE}"
        hub.add(url, content, etag=f'"{etag}"', headers={"X-Repo-Commit": commit})


def test_fresh_then_cached(hub, get, home):
    publish(hub, CONTENT, OLD)
    path = get()
    assert path == home / "weights" / NAME / FILE and path.read_bytes() == CONTENT
    asked = len(hub.requests)
    assert get() == path and get(offline=True) == path and len(hub.requests) == asked
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", FILE, f"{FILE}.stamp"]


def test_progress(hub, get, capfd):
    publish(hub, CONTENT, OLD)
    seen = []
    get(progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and FILE not in capfd.readouterr().err
    assert not huggingface_hub.utils.are_progress_bars_disabled()


def test_a_named_commit_is_what_is_asked_for(hub, get):
    publish(hub, CONTENT, OLD)
    publish(hub, OTHER, NEW)
    assert get({"hub": f"owner/net@{OLD}", "sha256": DIGEST}).read_bytes() == CONTENT
    assert all("main" not in path for _, path, _ in hub.requests)


def test_the_first_download_pins_the_commit(hub, get, home):
    publish(hub, CONTENT, OLD)
    get()
    recorded = json.loads((home / "pins.json").read_text())[f"hf://owner/net/{FILE}"]
    assert (recorded["commit"], recorded["sha256"], recorded["bytes"]) == (OLD, DIGEST, len(CONTENT))
    shutil.rmtree(home / "weights")
    publish(hub, OTHER, NEW)  # main moves on; the recorded commit stays what it is
    assert get().read_bytes() == CONTENT


def test_a_rewritten_commit_is_an_error(hub, get, home):
    publish(hub, CONTENT, OLD)
    get()
    shutil.rmtree(home / "weights")
    publish(hub, OTHER, OLD)
    with pytest.raises(WeightsError, match=f"hf://owner/net/{FILE} has SHA-256 .* expected {DIGEST} as recorded"):
        get()


def test_the_hash_that_the_hub_states_is_checked(hub, get, home):
    publish(hub, CONTENT, OLD, etag="0" * 64)  # the client itself does not notice
    with pytest.raises(WeightsError, match=f"has SHA-256 {DIGEST}, expected {'0' * 64}"):
        get()
    assert not (home / "weights" / NAME / FILE).exists() and not (home / "pins.json").exists()


def test_the_manifests_hash_is_checked(hub, get, home):
    publish(hub, OTHER, OLD)
    with pytest.raises(WeightsError, match=f"expected {DIGEST}"):
        get({"hub": "owner/net", "sha256": DIGEST})
    assert [file.name for file in (home / "weights" / NAME).iterdir()] == [".lock"]


def test_small_files_have_no_stated_hash(hub, get):
    publish(hub, CONTENT, OLD, etag="a" * 40)
    assert get().read_bytes() == CONTENT


def test_hub_and_url_stand_in_for_each_other(hub, get, tmp_path):
    missing_url = {"url": f"{hub.url}/gone", "file": "gone.safetensors"}
    with pytest.raises(WeightsError, match=rf"/gone: .* 404 .*hf://owner/net/{FILE}"):
        get(missing_url, {"hub": "owner/net"})
    publish(hub, CONTENT, OLD)
    assert get(missing_url, {"hub": "owner/net"}).read_bytes() == CONTENT
    hub.add("/there", OTHER)
    there = {"url": f"{hub.url}/there", "file": "there.safetensors"}
    assert get({"hub": "owner/absent", "file": "absent.safetensors"}, there).read_bytes() == OTHER


def test_an_insecure_hub_is_refused(hub, get):
    publish(hub, CONTENT, OLD)
    with pytest.raises(WeightsError, match="expected https, got http"):
        get(loopback_http=False)
    assert hub.requests == []


def test_a_hub_that_redirects_to_http_is_refused(hub, get):
    for revision in (OLD, "main"):
        resource = hub.add(f"/owner/net/resolve/{revision}/{FILE}", b"", redirect="http://example.org/blob")
        resource.headers["X-Repo-Commit"] = OLD
    with pytest.raises(WeightsError, match=r"refused to fetch http://example\.org/blob"):
        get()
    assert hub.gets == 0


def test_offline_the_hub_clients_own_cache_serves(hub, get, tmp_path, home):
    snapshot = tmp_path / "hub" / "models--owner--net" / "snapshots" / OLD
    snapshot.mkdir(parents=True)
    (snapshot / FILE).write_bytes(CONTENT)
    with pytest.raises(WeightsError, match="offline mode"):
        get(offline=True)  # no reference says that this commit is main
    refs = tmp_path / "hub" / "models--owner--net" / "refs"
    refs.mkdir()
    (refs / "main").write_text(OLD)
    path = get(offline=True)
    assert path == home / "weights" / NAME / FILE and path.read_bytes() == CONTENT and hub.requests == []


def test_offline_a_wrong_file_in_the_hub_clients_cache_is_refused(get, tmp_path):
    snapshot = tmp_path / "hub" / "models--owner--net" / "snapshots" / OLD
    snapshot.mkdir(parents=True)
    (snapshot / FILE).write_bytes(OTHER)
    with pytest.raises(WeightsError, match=f"expected {DIGEST}"):
        get({"hub": f"owner/net@{OLD}", "sha256": DIGEST}, offline=True)
