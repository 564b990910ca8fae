"""The bundled manifest, hostile ones, names, and the entries of packaged files."""

import hashlib
import json
import os
import re

import pytest
import torch
from foveal.weights import (
    Entry,
    Mirror,
    Transfer,
    WeightsError,
    bundled_manifest,
    fetch,
    load,
    load_manifest,
    lookup,
    save,
    write_packaged_entry,
)
from weights_server import write_manifest

NAME = "natten_test_m.tag"
ENTRIES = list(bundled_manifest().entries.values())
OFFICIAL = {
    **{f"natten_nat_{size}.shi_in1k": top1 for size, top1 in zip("mtsb", (81.8, 83.2, 83.7, 84.3), strict=True)},
    **{f"natten_dinat_{size}.shi_in1k": top1 for size, top1 in zip("mtsb", (81.8, 82.7, 83.8, 84.4), strict=True)},
    "natten_dinat_l.shi_in22k_ft_in1k": 86.6,
    "natten_dinat_l.shi_in22k": None,
    "natten_dinat_l_384.shi_in22k_ft_in1k_384": 87.4,
    "natten_dinat_l_11x11_384.shi_in22k_ft_in1k_384": 87.5,
    "natten_dinat_l_11x11_384.shi_in22k": None,
    **{f"natten_dinats_{size}.shi_in1k": top1 for size, top1 in zip("tsb", (81.8, 83.5, 83.8), strict=True)},
    "natten_dinats_l.shi_in22k_ft_in1k": 86.5,
    "natten_dinats_l.shi_in22k": None,
    "natten_dinats_l_384.shi_in22k_ft_in1k_384": 87.4,
    "natten_nat_iso_s.shi_in1k": 80.0,
    "natten_nat_iso_b.shi_in1k": 81.6,
    "natten_dinat_iso_s.shi_in1k": 80.8,
    "natten_dinat_iso_b.shi_in1k": 82.1,
    "natten_vitrpb_s.shi_in1k": 81.2,
    "natten_vitrpb_b.shi_in1k": 82.5,
}


def test_every_official_checkpoint_of_the_family_is_there():
    found = {entry.name: entry.metrics.get("top1") for entry in ENTRIES if ".shi_" in entry.name}
    assert found == OFFICIAL


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_bundled_entries(entry):
    assert entry.license and entry.source.startswith("https://") and entry.img_size > 0
    for mirror in entry.mirrors:
        assert mirror.url is None or mirror.url.startswith("https://")
        assert mirror.package is None or fetch(entry.name).stat().st_size == mirror.bytes
    assert Entry.from_json(entry.name, json.loads(json.dumps(entry.to_json()))) == entry
    assert ("22k" in entry.name and "ft" not in entry.name) == (entry.num_classes is None)
    assert entry.img_size == 384 or not re.search(r"\..*384", entry.name)


def test_no_two_entries_share_a_file():
    places = [mirror.location for entry in ENTRIES for mirror in entry.mirrors]
    assert len(set(places)) == len(places)


def test_dinat_s_means_small():
    assert lookup("natten_dinat_s.shi_in1k").mirrors[0].file == "dinat_small_in1k_224.pth"
    assert lookup("natten_dinats_s.shi_in1k").mirrors[0].file == "dinat_s_small_in1k_224.pth"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("natten_dinat_s.shi_in1", "did you mean natten_dinat_s.shi_in1k"),
        ("natten_dinat_s", r"did you mean natten_dinat_s\.shi_in1k\?"),
        ("natten_dinat_l", r"did you mean natten_dinat_l\.shi_in22k_ft_in1k or natten_dinat_l\.shi_in22k\?"),
        ("qqqqq.zz", "`foveal weights list` shows all names"),
    ],
)
def test_unknown_names_suggest_the_nearest(name, message):
    with pytest.raises(WeightsError, match=message):
        lookup(name)


HOSTILE = [
    "../../etc/passwd",
    "..",
    "a/../../b.c",
    "/etc/passwd",
    "C:\\windows.x",
    "a\\b.c",
    "natten_dinat_s.shi_in1k\0",
    "a\nb.c",
    "~root.x",
    "",
    ".",
    "a.b.c",
    "A.b",
    "http://example.org/a.b",
    "%2e%2e.x",
    "ａ.b",
    "x" * 5000 + "/.b",
]


@pytest.mark.parametrize("name", [*HOSTILE, None, 3, b"a.b", ["a.b"]], ids=repr)
def test_hostile_names_are_refused(tmp_path, name):
    with pytest.raises(WeightsError, match="is not a weights name"):
        fetch(name, cache_dir=tmp_path, transfer=Transfer(attempts=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_hostile_names_in_a_manifest_are_refused(tmp_path, name):
    with pytest.raises(WeightsError, match=r"expected 'architecture\.tag'"):
        write_manifest(tmp_path / "m.json", {"url": "https://example.org/w"}, name=name)


GOOD = {"url": "https://example.org/w"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[({"file": name}, "file is") for name in ("../w.pth", "/w.pth", "a/b.pth", "a\0.pth", ".hidden.pth", "w", "")],
        *[({"file": name}, "file is") for name in ("w.pkl", "w.zip", "a\\b.pth", "w.pth\n", "..pth", "w.pth.partial")],
        *[({"url": url}, "url is") for url in ("http://example.org/w", "ftp://example.org/w", "file:///etc/passwd")],
        *[({"url": url}, "url is") for url in ("https://", "https://u:p@example.org/w", "https://e.org/\n", "w", 3)],
        *[({"url": url}, "url is") for url in ("https://e.org:x/w", "https://[::1/w", "http://127.0.0.1.e.org/")],
        ({"url": None}, "exactly one of url, hub and package"),
        ({"hub": "owner/net"}, "exactly one of url, hub and package"),
        *[({"url": None, "hub": hub}, "hub is") for hub in ("net", "a/b/c", "../b", "a/b@main", "a/b@" + "A" * 40)],
        *[({"sha256": digest}, "sha256 is") for digest in ("abc", "A" * 64, "0" * 63, 7)],
        *[({"bytes": size}, "bytes is") for size in (0, -1, 1.5, True, "9")],
        ({"format": "jax"}, "format is 'jax'"),
        ({"container": ""}, "container is ''"),
        ({"extra": 1}, r"fields is \['extra'\]"),
        ({"url": None, "package": "model.safetensors"}, "sha256 is None; expected a hash"),
        ({"url": None, "package": "../m.safetensors", "sha256": "0" * 64, "bytes": 1}, "file is"),
    ],
    ids=str,
)
def test_malformed_mirrors_are_refused(tmp_path, changes, message):
    mirror = {key: value for key, value in (GOOD | changes).items() if value is not None or key not in GOOD}
    with pytest.raises(WeightsError, match=rf"entry '{NAME}': .*{message}"):
        write_manifest(tmp_path / "m.json", mirror)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"license": " "}, "license is ' '"),
        ({"license": None}, "license is None"),
        ({"source": "http://example.org"}, "source is"),
        ({"img_size": "224"}, "img_size is '224'"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"params": 1.5}, "params is 1.5"),
        ({"metrics": {"top1": "83"}}, "metrics is"),
        ({"metrics": {"top1": float("nan")}}, "metrics is"),
        ({"metrics": 3}, "metrics is"),
        ({"notes": 3}, "notes is"),
        ({"licens": "MIT"}, r"fields is \['licens'\]"),
    ],
    ids=str,
)
def test_malformed_entries_are_refused(tmp_path, fields, message):
    with pytest.raises(WeightsError, match=message):
        write_manifest(tmp_path / "m.json", GOOD, **fields)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", "[" * 100_000, '{"a.b": 3}', '{"a.b": {}}', '{"a.b": {"mirrors": [1]}}'),
        '{"a.b": {"mirrors": [], "license": "MIT", "source": "https://e.org", "img_size": 1}}',
        '{"a.b": {"mirrors": [], "name": "c.d"}}',
        '{"a.b": {"mirrors": [{"format": "official"}]}}',
    ],
    ids=lambda text: text[:60],
)
def test_malformed_files_are_refused(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(WeightsError, match="weights manifest"):
        load_manifest(tmp_path / "m.json")


def test_repeated_names_and_files_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="a different file name for each mirror"):
        write_manifest(tmp_path / "m.json", GOOD, {"url": "https://example.org/v"})
    text = (tmp_path / "m.json").read_text()
    (tmp_path / "m.json").write_text(text[:-1] + "," + text[1:])
    with pytest.raises(WeightsError, match="repeated keys"):
        load_manifest(tmp_path / "m.json")
    with pytest.raises(WeightsError, match="cannot read the weights manifest"):
        load_manifest(tmp_path / "absent.json")


def test_a_folder_holds_one_file_per_family(tmp_path):
    folder = tmp_path / "list"
    folder.mkdir()
    with pytest.raises(WeightsError, match=r"expected <family>\.json in this folder"):
        load_manifest(folder)
    write_manifest(folder / "natten.json", GOOD)
    write_manifest(folder / "other.json", GOOD, name="other_net.tag")
    assert list(load_manifest(folder).entries) == [NAME, "other_net.tag"]
    path = save({"w": torch.ones(3)}, tmp_path / "natten_test_p.digits.safetensors")
    entry = write_packaged_entry(path, **PACKAGED, manifest_path=folder)
    assert list(json.loads((folder / "natten.json").read_text())) == [NAME, entry.name]
    assert fetch(entry.name, manifest=load_manifest(folder)) == path
    (folder / "natten.json").rename(folder / "another.json")
    with pytest.raises(WeightsError, match=f"name is '{NAME}'; expected a name of the family 'another'"):
        load_manifest(folder)


PACKAGED = dict(
    name="natten_test_p.digits",
    metrics={"top1": 98.5},
    license="Apache-2.0",
    source="https://example.org",
    img_size=32,
    num_classes=10,
)


def test_packaged_entries_are_written_updated_and_fetched(tmp_path):
    write_manifest(tmp_path / "manifest.json", GOOD)
    path = save({"w": torch.ones(3)}, tmp_path / "natten_test_p.digits.safetensors")
    entry = write_packaged_entry(path, **PACKAGED, manifest_path=tmp_path / "manifest.json")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert entry.mirrors == (
        Mirror(format="foveal", file=path.name, package=path.name, sha256=digest, bytes=path.stat().st_size),
    )
    manifest = load_manifest(tmp_path / "manifest.json")
    assert list(manifest.entries) == [NAME, entry.name] and manifest.entries[entry.name] == entry
    assert json.loads((tmp_path / "manifest.json").read_text())[entry.name]["mirrors"] == [
        {"format": "foveal", "package": path.name, "sha256": digest, "bytes": path.stat().st_size, "container": None}
    ]
    found = fetch(entry.name, manifest=manifest, offline=True)
    assert found == path and load(found)["w"].tolist() == [1, 1, 1]

    save({"w": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match=f"has SHA-256 .*expected {digest}; install foveal again"):
        fetch(entry.name, manifest=manifest)
    again = write_packaged_entry(
        path, **PACKAGED | {"metrics": {"top1": 99.0}}, manifest_path=tmp_path / "manifest.json"
    )
    manifest = load_manifest(tmp_path / "manifest.json")
    assert list(manifest.entries) == [NAME, entry.name] and again.metrics == {"top1": 99.0}
    assert fetch(entry.name, manifest=manifest) == path
    os.unlink(path)
    with pytest.raises(WeightsError, match="cannot read the packaged file"):
        fetch(entry.name, manifest=manifest)


def test_a_packaged_file_must_lie_beside_the_manifest_under_its_name(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = save({"w": torch.ones(3)}, tmp_path / "elsewhere" / "natten_test_p.digits.safetensors")
    other = save({"w": torch.ones(3)}, tmp_path / "other.safetensors")
    for wrong in (path, other, tmp_path / "natten_test_p.digits.safetensors"):
        with pytest.raises(WeightsError, match="expected an existing file at"):
            write_packaged_entry(wrong, **PACKAGED, manifest_path=tmp_path / "manifest.json")
    assert not (tmp_path / "manifest.json").exists()
