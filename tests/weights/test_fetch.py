"""`fetch` against a server on loopback: what it delivers, and what it says when it cannot."""

import hashlib
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request

import pytest
import torch
from foveal.weights import Transfer, WeightsError, fetch, load
from safetensors.torch import save
from weights_server import serve, write_manifest

NAME = "natten_test_m.tag"
STATE = {"head.weight": torch.arange(60_000, dtype=torch.float32).reshape(10, 6000), "head.bias": torch.ones(10)}
CONTENT = save(STATE)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = save({key: value + 1 for key, value in STATE.items()})
QUICK = Transfer(timeout=5, attempts=3, backoff=0.01, loopback_http=True)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("FOVEAL_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def origin():
    with serve() as origin:
        yield origin


@pytest.fixture
def get(tmp_path, origin):
    """Calls `fetch` for a manifest with one mirror, by default the file the server calls /w with its true hash."""

    def get(*mirrors, transfer=QUICK, **arguments):
        mirrors = mirrors or ({"url": f"{origin.url}/w", "sha256": DIGEST, "bytes": len(CONTENT)},)
        manifest = write_manifest(tmp_path / "manifest.json", *mirrors)
        return fetch(NAME, manifest=manifest, transfer=transfer, **arguments)

    return get


def leftovers(home):
    """What lies in the entry's folder besides the file, its stamp and the lock."""
    folder = home / "weights" / NAME
    expected = {"model.safetensors", "model.safetensors.stamp", ".lock"}
    return sorted({path.name for path in folder.iterdir()} - expected) if folder.exists() else []


def partial_of(home):
    return home / "weights" / NAME / "model.safetensors.partial"


def interrupt(origin, get, **mirror):
    """Leaves a partial download of 100,000 bytes behind, where the server lets it be continued."""
    origin.resources["/w"].cuts = [100_000, 0, 0]
    with pytest.raises(WeightsError, match=r"closed after \d+ of"):
        get({"url": f"{origin.url}/w"} | mirror)


def test_fresh_then_cached(origin, get, home):
    origin.add("/w", CONTENT)
    seen = []
    path = get(progress=lambda done, total: seen.append((done, total)))
    assert path == home / "weights" / NAME / "model.safetensors" and path.read_bytes() == CONTENT
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT)) and len(seen) > 2
    assert leftovers(home) == []
    assert get() == path and origin.gets == 1
    torch.testing.assert_close(load(path), STATE)


def test_a_cache_dir_of_ones_own(origin, get, tmp_path):
    origin.add("/w", CONTENT)
    assert get(cache_dir=tmp_path / "mine") == tmp_path / "mine" / NAME / "model.safetensors"


def test_an_unchanged_file_is_not_hashed_again(origin, get):
    origin.add("/w", CONTENT)
    path = get()
    status = path.stat()
    damaged = bytearray(CONTENT)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert get().read_bytes() == damaged  # same size and time: trusted without hashing
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert get().read_bytes() == CONTENT and origin.gets == 2


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "empty"])
def test_a_damaged_cache_is_fetched_again(origin, get, damage):
    origin.add("/w", CONTENT)
    path = get()
    flipped = bytearray(CONTENT)
    flipped[len(flipped) // 2] ^= 4
    content = {"flipped": flipped, "truncated": CONTENT[:-9], "longer": CONTENT + b"0", "empty": b""}[damage]
    path.write_bytes(content)
    assert get().read_bytes() == CONTENT and origin.gets == 2


def test_offline_says_what_is_wrong_with_a_damaged_file(origin, get):
    origin.add("/w", CONTENT)
    path = get()
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(WeightsError, match=rf"offline mode.*damaged: it has {len(CONTENT) - 1} bytes"):
        get(offline=True)


def test_a_changed_manifest_rejects_the_old_file(origin, get):
    origin.add("/w", CONTENT)
    get()
    origin.add("/w", OTHER)
    wanted = hashlib.sha256(OTHER).hexdigest()
    assert get({"url": f"{origin.url}/w", "sha256": wanted}).read_bytes() == OTHER


def test_cut_connections_are_resumed(origin, get):
    origin.add("/w", CONTENT, cuts=[50_000, 70_000])
    assert get().read_bytes() == CONTENT
    assert [wanted for _, _, wanted in origin.requests] == [None, "bytes=50000-", "bytes=120000-"]
    assert origin.body_bytes == len(CONTENT)


def test_an_interrupted_download_is_continued_later(origin, get, home):
    origin.add("/w", CONTENT)
    interrupt(origin, get, sha256=DIGEST)
    assert partial_of(home).stat().st_size == 100_000
    assert not (home / "weights" / NAME / "model.safetensors").exists()
    assert get().read_bytes() == CONTENT and leftovers(home) == []
    assert origin.requests[-1][2] == "bytes=100000-" and origin.body_bytes == len(CONTENT)


def test_a_server_without_ranges_starts_over(origin, get):
    origin.add("/w", CONTENT, ranges=False, cuts=[100_000])
    assert get().read_bytes() == CONTENT
    assert origin.body_bytes == 100_000 + len(CONTENT)


def test_a_file_replaced_meanwhile_is_not_mixed(origin, get, home):
    origin.add("/w", CONTENT)
    interrupt(origin, get)
    asked = origin.gets
    origin.add("/w", OTHER, etag='"two"')  # If-Range fails, so the server sends all of the new file
    assert get({"url": f"{origin.url}/w"}).read_bytes() == OTHER
    assert origin.requests[-1][2] == "bytes=100000-" and origin.gets == asked + 1


def test_a_server_that_ignores_if_range_is_not_mixed(origin, get, home):
    origin.add("/w", CONTENT)
    interrupt(origin, get)
    new = origin.add("/w", OTHER, etag='"one"')
    new.headers["ETag"] = '"two"'
    new.cuts = []
    assert get({"url": f"{origin.url}/w"}).read_bytes() == OTHER


def test_without_validator_and_hash_nothing_is_continued(origin, get):
    origin.add("/w", CONTENT, etag=None)
    interrupt(origin, get)
    sent = origin.body_bytes
    assert get({"url": f"{origin.url}/w"}).read_bytes() == CONTENT
    assert origin.body_bytes - sent == len(CONTENT)


def test_without_validator_a_stale_beginning_is_found_by_the_hash(origin, get):
    origin.add("/w", OTHER, etag=None)
    interrupt(origin, get, sha256=DIGEST)
    origin.add("/w", CONTENT, etag=None)
    assert get().read_bytes() == CONTENT
    assert origin.requests[-2][2] == "bytes=100000-" and origin.requests[-1][2] is None


def test_a_complete_partial_file_needs_no_request(origin, get, home):
    origin.add("/w", CONTENT)
    interrupt(origin, get, sha256=DIGEST)
    partial_of(home).write_bytes(CONTENT)  # as if killed before it got its name
    asked = origin.gets
    assert get().read_bytes() == CONTENT and origin.gets == asked


def test_a_partial_file_longer_than_the_file_starts_over(origin, get, home):
    origin.add("/w", CONTENT)
    interrupt(origin, get, sha256=DIGEST)
    partial_of(home).write_bytes(CONTENT + b"more")
    assert get().read_bytes() == CONTENT


def test_wrong_hash(origin, get, home):
    origin.add("/w", OTHER)
    with pytest.raises(WeightsError) as raised:
        get()
    message = str(raised.value)
    assert f"{origin.url}/w" in message and DIGEST in message and hashlib.sha256(OTHER).hexdigest() in message
    assert leftovers(home) == [] and not (home / "weights" / NAME / "model.safetensors").exists()
    assert origin.gets == 1


def test_wrong_length_announced(origin, get, home):
    origin.add("/w", CONTENT)
    with pytest.raises(WeightsError, match=rf"offers {len(CONTENT)} bytes, expected 1234"):
        get({"url": f"{origin.url}/w", "sha256": DIGEST, "bytes": 1234})
    assert origin.gets == 1 and leftovers(home) == []


@pytest.mark.parametrize(("size", "message"), [(1234, "more than the expected 1234"), (10**7, "expected 10000000")])
def test_wrong_length_unannounced(origin, get, home, size, message):
    origin.add("/w", CONTENT, send_length=False)
    with pytest.raises(WeightsError, match=message):
        get({"url": f"{origin.url}/w", "bytes": size})
    assert leftovers(home) == []


def test_a_length_that_never_comes(origin, get):
    origin.add("/w", CONTENT, claimed_length=len(CONTENT) + 5, ranges=False)
    with pytest.raises(WeightsError, match=rf"closed after {len(CONTENT)} of {len(CONTENT) + 5} bytes.*3 failed"):
        get({"url": f"{origin.url}/w"})
    assert origin.gets == 3


def test_no_length_at_all_is_fine_with_a_hash(origin, get):
    origin.add("/w", CONTENT, send_length=False)
    assert get({"url": f"{origin.url}/w", "sha256": DIGEST}).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 403, 404, 410, 501])
def test_permanent_refusals_are_not_retried(origin, get, status):
    origin.add("/w", CONTENT, statuses=[status])
    with pytest.raises(WeightsError, match=f"answers {status}"):
        get()
    assert origin.gets == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_failures_are_retried(origin, get, status):
    origin.add("/w", CONTENT, statuses=[status, status])
    assert get().read_bytes() == CONTENT and origin.gets == 3


def test_lasting_failures_end(origin, get):
    origin.add("/w", CONTENT, statuses=[500] * 9)
    with pytest.raises(WeightsError, match=r"answers 500 .*3 failed attempts"):
        get()
    assert origin.gets == 3


def test_the_server_says_when_to_come_back(origin, get):
    origin.add("/w", CONTENT, statuses=[503], headers={"Retry-After": "1"})
    begin = time.monotonic()
    get()
    assert time.monotonic() - begin >= 1


@pytest.mark.parametrize("ranges", [True, False])
def test_large_files_may_need_more_attempts_but_only_while_they_grow(origin, get, ranges):
    """Attempts that bring a megabyte are no failures; without ranges they bring nothing new, and there is an end."""
    content = save({"w": torch.zeros(2_000_000)})
    origin.add("/w", content, ranges=ranges, cuts=[1_500_000] * 5)
    if ranges:
        assert get({"url": f"{origin.url}/w"}).read_bytes() == content and origin.gets == 6
    else:
        with pytest.raises(WeightsError, match="3 failed attempts in a row"):
            get({"url": f"{origin.url}/w"})
        assert origin.gets == 3


def test_timeout(origin, get, home):
    origin.add("/w", CONTENT, stall_after=1000)
    with pytest.raises(WeightsError, match=r"timed out.*2 failed attempts"):
        get(transfer=Transfer(timeout=0.2, attempts=2, backoff=0.01, loopback_http=True))
    assert partial_of(home).read_bytes() == CONTENT[:2000]  # each attempt brought a thousand bytes more


def test_nobody_listens(get):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/w"
    with pytest.raises(WeightsError, match=rf"{url}.*refused"):
        get({"url": url})


def test_redirects_are_followed(origin, get):
    origin.add("/w", b"", redirect=f"{origin.url}/there")
    origin.add("/there", CONTENT)
    assert get().read_bytes() == CONTENT


@pytest.mark.parametrize("target", ["http://example.org/w", "ftp://example.org/w"])
def test_redirects_to_anything_but_https_are_refused(origin, get, home, target):
    origin.add("/w", b"", redirect=target)
    with pytest.raises(WeightsError, match=rf"redirects.*refused to fetch {target}: expected https"):
        get()
    assert leftovers(home) == []


def test_redirects_to_local_files_are_refused(origin, get):
    origin.add("/w", b"", redirect="file:///etc/hostname")
    with pytest.raises(WeightsError, match="not allowed"):
        get()


def test_http_needs_the_opt_in(origin, get):
    origin.add("/w", CONTENT)
    with pytest.raises(WeightsError, match="expected https, got http"):
        get(transfer=Transfer())
    assert origin.requests == []


def test_a_redirect_loop_ends(origin, get):
    origin.add("/w", b"", redirect=f"{origin.url}/w")
    with pytest.raises(WeightsError, match=f"{origin.url}/w"):
        get()
    assert origin.gets < 20


def test_compressed_answers_are_refused(origin, get):
    origin.add("/w", CONTENT, headers={"Content-Encoding": "gzip"})
    with pytest.raises(WeightsError, match="encoding gzip"):
        get()


def test_a_page_instead_of_weights_is_refused_and_not_recorded(origin, get, home):
    origin.add("/w", b"<html>please log in</html>")
    with pytest.raises(WeightsError, match="does not give weights"):
        get({"url": f"{origin.url}/w"})
    assert leftovers(home) == [] and not (home / "pins.json").exists()


def test_the_next_mirror_is_asked_when_one_does_not_deliver(origin, get, tmp_path):
    origin.add("/w", CONTENT)
    gone = {"url": f"{origin.url}/gone", "file": "gone.safetensors"}
    assert get(gone, {"url": f"{origin.url}/w", "sha256": DIGEST}).name == "model.safetensors"
    with pytest.raises(WeightsError, match=r"no source delivers.*/gone: .* 404 .*/gone2: .* 404.*dict\(file=PATH\)"):
        get(gone, {"url": f"{origin.url}/gone2"}, cache_dir=tmp_path / "elsewhere")


def test_a_mirror_that_gives_something_else_is_an_error(origin, get):
    origin.add("/other", OTHER)
    origin.add("/w", CONTENT)
    wrong = {"url": f"{origin.url}/other", "file": "other.safetensors", "sha256": DIGEST}
    with pytest.raises(WeightsError, match="/other has SHA-256"):
        get(wrong, {"url": f"{origin.url}/w", "sha256": DIGEST})


def test_format_chooses_the_mirror(origin, get):
    origin.add("/w", CONTENT)
    origin.add("/t", OTHER)
    mirrors = {"url": f"{origin.url}/w"}, {"url": f"{origin.url}/t", "file": "t.safetensors", "format": "transformers"}
    assert get(*mirrors, format="transformers").name == "t.safetensors"
    assert get(*mirrors, format="official").name == "model.safetensors"
    with pytest.raises(WeightsError, match=r"no file of format 'jax'; expected one of \['official', 'transformers'\]"):
        get(*mirrors, format="jax")


def test_the_first_download_records_a_hash_that_later_ones_must_match(origin, get, home):
    mirror = {"url": f"{origin.url}/w"}
    origin.add("/w", CONTENT)
    get(mirror)
    pins = json.loads((home / "pins.json").read_text())
    recorded = pins[f"{origin.url}/w"]
    assert recorded["sha256"] == DIGEST and recorded["bytes"] == len(CONTENT)
    recorded["recorded"] = "2001-01-01"
    (home / "pins.json").write_text(json.dumps(pins))
    shutil.rmtree(home / "weights")
    origin.add("/w", OTHER, etag='"two"')
    with pytest.raises(WeightsError, match=rf"expected {DIGEST} as recorded at the first download.*pins.json"):
        get(mirror)
    origin.add("/w", CONTENT)
    assert get(mirror).read_bytes() == CONTENT
    assert json.loads((home / "pins.json").read_text()) == pins  # recorded once, at the first download


def test_a_damaged_record_of_hashes_is_an_error(origin, get, home):
    origin.add("/w", CONTENT)
    home.mkdir()
    (home / "pins.json").write_text("{")
    with pytest.raises(WeightsError, match="recorded hashes"):
        get({"url": f"{origin.url}/w"})


def test_a_file_put_there_by_hand_is_taken_if_it_is_weights(origin, get, home):
    mirror = {"url": f"{origin.url}/w"}
    path = home / "weights" / NAME / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert get(mirror, offline=True) == path
    assert json.loads((home / "pins.json").read_text())[f"{origin.url}/w"]["sha256"] == DIGEST
    path.write_bytes(OTHER)
    with pytest.raises(WeightsError, match=f"damaged: its SHA-256 is .*, expected {DIGEST}"):
        get(mirror, offline=True)


@pytest.mark.parametrize("variable", ["FOVEAL_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(origin, get, monkeypatch, variable):
    origin.add("/w", CONTENT)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(WeightsError, match=rf"not in the cache .* offline mode is on.*{origin.url}/w"):
        get()
    assert origin.requests == []
    path = get(offline=False)
    assert get() == path and origin.gets == 1


def test_a_disk_without_room_is_seen_before_the_download(origin, get, home):
    origin.add("/w", CONTENT, claimed_length=10**17)
    with pytest.raises(WeightsError, match=r"no space left in .*100000000000000000 bytes are needed"):
        get({"url": f"{origin.url}/w"})
    assert leftovers(home) == []


@pytest.mark.parametrize("what", ["folder", "file", "partial"])
def test_links_out_of_the_cache_are_refused(origin, get, home, tmp_path, what):
    origin.add("/w", CONTENT)
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = home / "weights" / NAME
    if what == "folder":
        folder.parent.mkdir(parents=True)
        folder.symlink_to(outside)
    else:
        folder.mkdir(parents=True)
        target = outside / "victim"
        target.write_text("untouched")
        (partial_of(home) if what == "partial" else folder / "model.safetensors").symlink_to(target)
    if what == "partial":
        assert get().read_bytes() == CONTENT  # the link is replaced, not followed
    else:
        with pytest.raises(WeightsError, match="leads out of the cache"):
            get()
    assert [path.read_text() for path in outside.iterdir()] == ["untouched"] * (what != "folder")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key and a self-signed certificate for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {folder}/key.pem -out {folder}/cert.pem"
    subprocess.run(command.split(), check=True, capture_output=True)
    return folder


@pytest.fixture
def secure_origin(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    with serve(context) as origin:
        yield origin


def test_https_needs_no_opt_in(secure_origin, certificate, get, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    secure_origin.add("/w", CONTENT)
    assert get({"url": f"{secure_origin.url}/w", "sha256": DIGEST}, transfer=Transfer()).read_bytes() == CONTENT


def test_https_to_http_is_refused(secure_origin, origin, certificate, get, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    secure_origin.add("/w", b"", redirect=f"{origin.url}/w")
    origin.add("/w", CONTENT)
    with pytest.raises(WeightsError, match="expected https, got http"):
        get({"url": f"{secure_origin.url}/w", "sha256": DIGEST}, transfer=Transfer())
    assert origin.requests == []


def test_an_unknown_certificate_is_refused(secure_origin, get):
    secure_origin.add("/w", CONTENT)
    with pytest.raises(WeightsError, match="certificate is not valid"):
        get({"url": f"{secure_origin.url}/w", "sha256": DIGEST})
    assert secure_origin.requests == []


def test_the_server_of_these_tests_does_serve(origin):
    """Guards the tests above that expect no request: the log does see what is asked."""
    origin.add("/w", b"hello")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{origin.url}/w") as response:
        assert isinstance(response, http.client.HTTPResponse) and response.read() == b"hello"
    assert origin.requests == [("GET", "/w", None)]
