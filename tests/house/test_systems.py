"""The ledger: every paper of the library has a row, and what a row names exists."""

import re
import sys
from pathlib import Path

import pytest
from foveal.zoo.systems import System, shelves
from foveal.zoo.systems.absent import ABSENT
from foveal.zoo.systems.page import filled, ledger, table

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = [system for shelf in shelves() for system in shelf.systems]
AGAIN = "run: python -m foveal.zoo.systems docs/systems.md docs/variants.md"
SHELVES = {  # folders of which every file is a system, but for these
    "kernels/masks": {"blocks", "named", "registry", "select", "table"},
    "kernels/scored": {
        "aot",
        "api",
        "backward",
        "call",
        "chunked",
        "configs",
        "cost",
        "forward",
        "launch",
        "lists",
        "reference",
        "rows",
        "score",
        "statistics",
        "tile",
    },
    "layers": {"base", "completion", "dense", "positions"},
    "zoo/backbones": set(),
    "zoo/control/recipes": set(),
    "zoo/heads": {"attentions", "few_labels", "parts"},
    "zoo/pretraining": {"views"},
    "zoo/restoration": {"base"},
}
MENTIONED = {  # papers that the code cites as background, and implements no more of than the host needs
    "1502.01852": "He's initialization", "1512.03385": "ResNet", "1602.02830": "straight-through signs",
    "1703.06211": "deformable convolutions, torchvision's", "1801.03924": "LPIPS, torchmetrics'",
    "1801.04381": "MobileNetV2",
    "2202.00512": "prediction of v, diffusers'",
    "2012.12877": "DeiT", "2102.12122": "PVT", "2105.14217": "LIT, the layout of LITv2", "2106.13797": "PVT v2",
    "2107.00652": "CSWin", "2205.14135": "FlashAttention, its backward pass", "2309.11523": "RMT, PPMA's layout",
    "1606.04797": "V-Net, Dice loss", "1612.01105": "PSPNet, pyramid pooling",
    "1807.10221": "UPerNet, of which the head is here with other norms",
    "2407.08608": "FlashAttention-3, its order of warps",
    "2310.04378": "latent consistency models, guided paths", "2310.14189": "pseudo-Huber distance",
}  # fmt: skip


def test_pages_are_up_to_date():
    assert (ROOT / "docs" / "systems.md").read_text() == ledger(), AGAIN
    page = (ROOT / "docs" / "variants.md").read_text()
    assert page.count("<!-- systems: ") >= 7 and filled(page) == page, AGAIN


def test_every_place_exists():
    for system in SYSTEMS:
        assert all(found is not None for found in system.objects()), system


def test_every_test_names_its_system():
    wrong = []
    for system in SYSTEMS:
        file, _, text = system.test.partition("::")
        path = ROOT / "tests" / file
        recorded = (ROOT / "tests" / "goldens" / f"{text}_keys.json.xz").exists()  # `test_goldens` reads all of them
        if not path.exists() or not (text in path.read_text() or (file == "zoo/test_goldens.py" and recorded)):
            wrong.append(f"{system.name}: {system.test}")
    assert not wrong, "\n".join(wrong)


def files_of(system: System) -> set[Path]:
    """Files that define the objects of a system."""
    modules = [getattr(found, "__module__", None) for found in system.objects()]
    modules += ["foveal." + place.partition(":")[0] for place in system.places]
    return {Path(sys.modules[name].__file__ or "") for name in modules if name}


def test_every_file_of_a_shelf_has_a_row():
    known = {path.resolve() for system in SYSTEMS for path in files_of(system)}
    missing = [
        path.relative_to(ROOT).as_posix()
        for folder, helpers in SHELVES.items()
        for path in sorted((ROOT / folder).glob("*.py"))
        if path.stem not in {"__init__", *helpers} and path not in known
    ]
    assert not missing, "\n".join(missing)
    stale = [f"{f}/{n}" for f, names in SHELVES.items() for n in names if not (ROOT / f / f"{n}.py").exists()]
    assert not stale, stale


def test_every_cited_paper_has_a_row_or_is_background():
    listed = {number for system in SYSTEMS for number in re.findall(r"\d{4}\.\d{5}", system.source)}
    cited: dict[str, str] = {}
    for folder in ("kernels", "layers", "zoo"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for number in re.findall(r"(?<=arXiv:)\d{4}\.\d{5}", path.read_text()):
                cited[number] = path.relative_to(ROOT).as_posix()
    absent = {number for entry in ABSENT for number in re.findall(r"\d{4}\.\d{5}", entry.source)}
    known = listed | absent | set(MENTIONED)
    lacking = {number: where for number, where in cited.items() if number not in known}
    assert not lacking, lacking
    assert not (absent | set(MENTIONED)) & listed and set(MENTIONED) <= set(cited), sorted(set(MENTIONED) - set(cited))


def test_rows_are_distinct():
    keys = [(system.name, system.where, system.shown) for system in SYSTEMS]
    assert len(keys) == len(set(keys)) > 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"status": "done"}, "status='done'"),
        ({"status": "partial"}, "note=''"),
        ({"test": "zoo/test_systems.py"}, "expected 'file::text'"),
    ],
)
def test_wrong_rows(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        System(**{"name": "A", "source": "", "where": "layers", "test": "a::b"} | fields)
    with pytest.raises(ValueError, match="'nothing' must be one of"):
        table("nothing")
