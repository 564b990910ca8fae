"""The configurations: all compose, name only trusted classes, and mistakes get one sentence."""

import copy
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from foveal import train
from foveal.zoo.tasks.launch import check_targets, resolve_run
from foveal.zoo.tasks.sweep import metric_mode
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from train_helpers import assert_one_sentence

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


def text(experiment: str) -> str:
    return (CONFIGS / "experiment" / f"{experiment}.yaml").read_text()


@cache
def _composed(*overrides: str):
    with initialize_config_module("foveal.configs", version_base="1.3"):
        return compose("train", overrides=[*overrides, "run_dir=unused"])


def composed(*overrides: str):
    return copy.deepcopy(_composed(*overrides))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_names_trusted_classes(name):
    config = composed(f"experiment={name}")
    assert config.name == name
    check_targets(config)
    assert config.task.optimizer.lr > 0


def test_plain_is_the_experiment_of_the_digits():
    assert composed() == composed("data=digits") == composed("experiment=digits_dinat")
    assert composed("task.optimizer.lr=0.1").callbacks.ema.decay == 0.99


@pytest.mark.parametrize(
    "name", [name for name in EXPERIMENTS if name.startswith("digits_") and "/task:" not in text(name)]
)
def test_a_small_model_on_the_digits_is_its_experiment(name):
    """So that a sweep over models compares what the experiments do."""
    model = text(name).split("override /model: ")[1].split()[0]
    assert composed(f"model={model}") == composed(f"experiment={name}")


@pytest.mark.parametrize(
    "chosen",
    [
        ("data=imagefolder", "data.root=x", "model=timm", "model.name=natten_dinat_m"),
        ("data=imagefolder", "data.root=x"),
        ("model=timm", "model.name=natten_dinat_m"),
        ("data=imagefolder", "data.root=x", "model=litv2_pico"),
    ],
    ids=" ".join,
)
def test_data_or_model_bring_neutral_values(chosen, tmp_path):
    """The same on the command line as in somebody's experiment."""
    config = composed(*chosen)
    assert (config.name, config.threads, config.trainer.accelerator) == ("unnamed", None, "auto")
    assert (config.task.optimizer.lr, config.trainer.max_epochs, config.trainer.gradient_clip_val) == (1e-3, 100, None)
    assert config.callbacks.ema.decay == 0.9999 and config.callbacks.ema.warmup
    groups = {item.split("=")[0]: item.split("=")[1] for item in chosen if "." not in item.split("=")[0]}
    (tmp_path / "experiment").mkdir()
    overrides = "\n".join(f"  - override /{group}: {choice}" for group, choice in groups.items())
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\ndefaults:\n{overrides}\n")
    values = [item for item in chosen if "." in item.split("=")[0]]
    with initialize_config_module("foveal.configs", version_base="1.3"):
        path = f"hydra.searchpath=[file://{tmp_path}]"
        assert compose("train", overrides=["experiment=mine", path, *values, "run_dir=unused"]) == config


def test_the_documented_experiment_of_ones_own(tmp_path):
    text = (CONFIGS.parent / "docs" / "training.md").read_text()
    (example,) = (block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if "name: mine" in block)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(example)
    with initialize_config_module("foveal.configs", version_base="1.3"):
        config = compose("train", overrides=["experiment=mine", f"hydra.searchpath=[file://{tmp_path}]", "run_dir=x"])
    assert (config.name, config.data.root, config.data.batch_size) == ("mine", "/data/mine", 64)
    assert config.model.pretrained and config.callbacks.ema.warmup and config.task.scheduler.warmup_epochs == 2
    assert (config.trainer.max_epochs, config.trainer.gradient_clip_val, config.threads) == (50, 1.0, None)


@pytest.mark.parametrize("name", [None, *EXPERIMENTS])
def test_averages_warm_up_unless_an_experiment_says_otherwise(name):
    """A short run is measured on its initial weights otherwise."""
    ema = composed(*([f"experiment={name}"] if name else [])).callbacks.get("ema")
    assert ema is None or ema.warmup or ema.decay <= 0.99


def expand(name: str) -> list[str]:
    """`a_{b,c}` as a_b and a_c."""
    start, braces, rest = name.partition("{")
    ends, _, tail = rest.partition("}")
    return [f"{start}{end}{tail}" for end in ends.split(",")] if braces else [name]


def test_the_table_of_groups_is_the_disk():
    """A row that ends with … shows some of the choices, all others show all."""
    page = (CONFIGS.parent / "docs" / "training.md").read_text().split("| group | choices | is |")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", page, re.M))
    assert set(rows) == {path.name for path in CONFIGS.iterdir() if path.is_dir()} - {"__pycache__", "recipe"}
    for group, row in rows.items():
        named = {choice for name in re.findall(r"`(.+?)`", row) for choice in expand(name)}
        there = {path.stem for path in (CONFIGS / group).glob("*.yaml")}
        assert named <= there if row.endswith("…") else named == there, group


@pytest.mark.parametrize("name", ["NAME", *EXPERIMENTS])
def test_every_experiment_says_command_hardware_and_expected_number(name):
    """So does the pattern of CONTRIBUTING.md."""
    page = (CONFIGS.parent / "CONTRIBUTING.md").read_text() if name == "NAME" else f"```yaml\n{text(name)}"
    header = page.split("```yaml\n")[1].split("defaults:")[0]
    for entry in ("# Command:", "# Hardware:", "# Expected:"):
        assert entry in header
    assert f"experiment={name}" in header
    expected = header.split("# Expected:")[1].split("\n")[0]
    names = r"test accuracy|test SRCC|test MPJPE|top-1|test mIoU|test mAP|test R²|test/loss|after [\d,]+ steps val/loss"
    measured = rf"\d+\.\d+ dB PSNR|({names}) \d+\.?\d+"
    assert re.match(rf"\s+(not known|{measured})", expected)


def test_sharded_weights_are_kept_in_float32():
    """Steps of 1e-4 move few weights of bfloat16."""
    for experiment in EXPERIMENTS:
        assert composed(f"experiment={experiment}", "trainer=fsdp").trainer.precision in ("32-true", "bf16-mixed")
    assert composed("trainer=fsdp").trainer.precision == "bf16-mixed"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_no_logic_in_yaml(path):
    text = path.read_text()
    yaml.safe_load(text)
    resolvers = set(re.findall(r"\$\{([\w.]+):", text))
    assert resolvers <= ({"now"} if path.name == "train.yaml" else set())


def test_every_choice_of_every_group_composes():
    for path in FILES:
        group = path.parent.relative_to(CONFIGS).as_posix()
        if group not in (".", "sweep", "experiment", "debug/of_task"):
            needed = {"timm": ["model.name=vit_tiny_patch16_224"] if group == "model" else []}.get(path.stem, [])
            config = composed(f"{group}={path.stem}", *needed)
            if group == "data" and path.stem == "timm":
                config.data.name, config.data.num_classes = "torch/cifar10", 10
            check_targets(config)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "hydra.utils.instantiate",
        "fovealx.Thing",
        "lightning.pytorch.trainer.trainer.os.system",
        "foveal.zoo.tasks.launch.subprocess.Popen",
        "foveal.zoo.tasks.launch.get_object",
        "torch.optim.optimizer.Any",
        "lightning.pytorch.NoSuchClass",
        "foveal.",
    ],
)
@pytest.mark.parametrize("key", ["task._target_", "callbacks.ema._target_", "data.options.deep._target_"])
def test_untrusted_targets_are_refused(target, key):
    config = composed("data=timm", "data.name=x", "data.num_classes=2")
    OmegaConf.set_struct(config, False)
    OmegaConf.update(config, key, target, force_add=True)
    with pytest.raises(ValueError, match=re.escape(f"{key}={target!r}")):
        check_targets(config)
    with pytest.raises(ValueError, match="_target_"):
        train.build(config)


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ([], "max"),
        (["sweep=families"], "max"),
        (["experiment=moving_digits"], "min"),
        (["experiment=moving_digits", "metric=test/loss"], "min"),
        (["experiment=moving_digits", "metric=test/accuracy", "metric_mode=max"], "max"),
        (["metric=val/loss", "metric_mode=min"], "min"),
        (["metric=val/acc1", "callbacks.best=null", "callbacks=early_stopping"], "max"),
        (["debug=fast"], "max"),
        (["debug=overfit"], "min"),
        (["debug=overfit", "experiment=moving_digits"], "min"),
    ],
    ids=" ".join,
)
def test_sweeps_go_the_way_of_the_monitored_metric(arguments, mode):
    assert metric_mode(composed(*arguments)) == mode


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_swept(name):
    config = composed(f"experiment={name}")
    assert metric_mode(config) == ("min" if config.metric.endswith(("loss", "mpjpe")) else "max")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["metric=val/loss"], "metric='val/loss' is monitored by no callback"),
        (["callbacks.best=null"], "metric='val/acc1' is monitored by no callback"),
        (["metric_mode=less"], "metric_mode='less' is not known: pass metric_mode=max or metric_mode=min"),
    ],
)
def test_a_sweep_without_a_direction_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        metric_mode(composed(*arguments))


def test_targets_inside_lists_are_seen():
    config = composed()
    OmegaConf.set_struct(config, False)
    config.trainer.plugins = [[{"_target_": "os.system"}]]
    with pytest.raises(ValueError, match=r"trainer\.plugins\.0\.0\._target_='os\.system'"):
        check_targets(config)


def test_trusted_targets_pass():
    config = OmegaConf.create({"a": {"_target_": "torch.optim.AdamW"}, "b": {"_target_": "lightning.pytorch.Trainer"}})
    check_targets(config)


MISTAKES = [
    (
        ["trainer.max_epoch=3"],
        "trainer.max_epoch is not a key of this configuration: did you mean 'trainer.max_epochs'",
    ),
    (["model.args.drop=1"], "model.args"),
    (["experiment=digit_dinat"], "experiment='digit_dinat' is not known: did you mean 'digits_dinat'"),
    (["data=imagefolders"], "data='imagefolders' is not known: did you mean 'imagefolder'"),
    (["model=timm"], "model.name has no default"),
    (["model.name=natten_dinat_pic"], "model.name='natten_dinat_pic' is not known: did you mean 'natten_dinat_pico'"),
    (["+model.args.depth=3"], "model.name='natten_dinat_pico' cannot be built with model.args="),
    (["data=imagefolder"], "data.root is not set"),
    (["data=imagefolder", "data.root=/no/such/folder"], "data.root='/no/such/folder' is not a folder"),
    (["data=timm", "data.name=torch/cifar11", "data.num_classes=10"], "did you mean 'torch/cifar10'"),
    (["task.optimizer.opt=adamv"], "task.optimizer.opt='adamv' is not known: did you mean 'adam'"),
    (["task.scheduler.sched=cosin"], "task.scheduler.sched='cosin' is not known: did you mean 'cosine'"),
    (["ckpt_path=/no/such/file"], "ckpt_path='/no/such/file' does not exist"),
    (["trainer.precision=77"], "Precision"),
    (["+trainer.colour=1"], "colour"),
    (["+data.colour=1"], "colour"),
    (["data.batch_size=5000"], "data.batch_size=5000 on 1 device(s) needs 5000 training images, and there are 1257"),
    (["callbacks.ema.decay=2"], "callbacks.ema.decay=2 must be"),
    (["task._target_=os.system"], "task._target_='os.system' is not allowed"),
    (["trainer.strategy=fsdp", "callbacks.ema._target_=null"], "callbacks.ema"),
    (["trainer.max_epochs=["], "no viable alternative"),
    (["task.mixup={mixup_alpha: 0.8}", "data.batch_size=7"], "data.batch_size=7 must be even with task.mixup"),
    (["task.mixup={mixup_alpha: 0.0}"], "task.mixup={'mixup_alpha': 0.0} does not work: One of mixup_alpha"),
    (["task.mixup={colour: 1}"], "task.mixup={'colour': 1} does not work: Mixup.__init__() got an unexpected"),
    (["+task.optimizer.colour=1"], "does not work: AdamW.__init__() got an unexpected keyword argument 'colour'"),
    (["task.optimizer.lr=fast"], "task.optimizer.lr='fast' must be a number"),
    (["+task.scheduler.colour=1"], "does not work: create_scheduler_v2() got an unexpected keyword argument 'colour'"),
    (["metric=val/acc"], "metric='val/acc' is not known: did you mean 'val/acc"),
    (["metric=test/acc1", "test=false"], "metric='test/acc1' is not measured with test=false"),
    (["callbacks.best.monitor=val/accc1"], "callbacks.best.monitor='val/accc1' is not known: did you mean 'val/acc1'"),
    (["run_dir=/proc/run"], "run_dir='/proc/run' cannot be written: No such file or directory"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_get_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    fast = ["trainer.fast_dev_run=true", f"runs={tmp_path}"]
    assert_one_sentence([*fast, *arguments], sentence, monkeypatch, capsys)


def test_full_error_keeps_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["foveal-train", "model.name=natten_dinat_pic", f"runs={tmp_path}"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.delenv("FOVEAL_ONE_SENTENCE", raising=False)
    with pytest.raises(InstantiationException, match="natten_dinat_pic"):
        train.main()


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    """Only mistakes we know of become a sentence."""
    from foveal.zoo.tasks.explain import explain

    assert explain(RuntimeError("boom")) is None
    assert explain(ValueError("raised by somebody else")) is None


def test_auto_finds_the_newest_last_checkpoint_of_the_experiment(tmp_path):
    def make(run: str) -> Path:
        path = tmp_path / run / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
        return path

    make("digits_dinat/2024-01-01_00-00-00")
    newest = make("digits_dinat/2023-01-01_00-00-00")  # by time of writing, not by name
    make("another/2025-01-01_00-00-00")
    (newest.parent / "last.ckpt.partial").write_bytes(b"half")
    config = composed("ckpt_path=auto", f"runs={tmp_path}")
    config.run_dir = None
    assert resolve_run(config) == (newest.parent.parent, newest)
    config.ckpt_path = None
    run_dir, checkpoint = resolve_run(config)
    assert checkpoint is None and run_dir.parent == tmp_path / "digits_dinat"
    config.ckpt_path, config.name = "auto", "never_run"
    assert resolve_run(config)[1] is None
    config.run_dir = str(newest.parent.parent)
    assert resolve_run(config) == (newest.parent.parent, newest)
    config.run_dir = str(tmp_path / "digits_dinat" / "job_1")
    assert resolve_run(config) == (tmp_path / "digits_dinat" / "job_1", None)
