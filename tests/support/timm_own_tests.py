"""timm's own `tests/test_models.py` on models of the zoo: a plugin of pytest.

timm's wheel comes without tests, its source archive with them:

    pip download --no-deps --no-binary :all: timm==$(python -c "import timm; print(timm.__version__)") -d SOMEWHERE
    tar xf SOMEWHERE/timm-*.tar.gz -C SOMEWHERE
    PYTHONPATH=tests/support python -m pytest -k "not torchscript" -p timm_own_tests -c /dev/null --rootdir SOMEWHERE \\
        --noconftest SOMEWHERE/timm-*/tests/test_models.py

Models are the smallest of each family that are no `test_*` models and all `*_pico` (`FOVEAL_MODELS=all` takes every
one). timm's lists of names sort layouts; here models whose features are tokens are what timm calls non-standard. Tests
of weights want a network and are left out.
"""

import fnmatch
import importlib
import os

import foveal.zoo
import timm
from foveal.zoo.table import our_models
from meta_models import create_without_data


def chosen_models() -> list[str]:
    """Names of the models, smallest of each family first."""
    chosen = []
    for family in foveal.zoo.backbones.FAMILIES:
        names = importlib.import_module(f"foveal.zoo.backbones.{family}").MODELS
        names = [name for name in names if name in our_models() and not name.startswith("test_")]
        if os.environ.get("FOVEAL_MODELS") != "all":
            large = [name for name in names if not name.endswith("_pico")]
            sizes = {name: sum(p.numel() for p in create_without_data(name).parameters()) for name in large}
            names = [name for name in names if name not in large] + sorted(large, key=sizes.__getitem__)[:1]
        chosen += names
    return chosen


def pytest_configure(config):
    models, tokens = chosen_models(), set()
    for name in models:
        if create_without_data(name).output_fmt == "NLC":
            tokens.add(name)

    def list_models(filter="", exclude_filters="", pretrained=False, include_tags=None, **options) -> list[str]:
        if pretrained or (isinstance(filter, str) and filter):  # weights; some models of timm by name
            return []
        asked = lambda patterns: "vit_*" in patterns  # noqa: E731  timm's own list of layouts
        left_out = [pattern for pattern in exclude_filters if not asked(exclude_filters)]
        names = [name for name in models if not any(fnmatch.fnmatch(name, pattern) for pattern in left_out)]
        names = [name for name in names if name in tokens] if asked(filter) else names
        return [name for name in names if name not in tokens] if asked(exclude_filters) else names

    timm.list_models = list_models
    timm.list_pretrained = lambda *args, **options: []


def pytest_collection_modifyitems(config, items):
    """Leaves timm's own models out."""
    models = our_models()
    ours = [x for x in items if hasattr(x, "callspec") and x.callspec.params.get("model_name") in models]
    config.hook.pytest_deselected(items=[x for x in items if x not in ours])
    items[:] = ours
