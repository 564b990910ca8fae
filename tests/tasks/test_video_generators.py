"""Transformers of diffusers in the video task: called as their pipelines call them, trained, resumed, saved."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from foveal import train
from foveal.zoo.accelerate import decelerate
from foveal.zoo.tasks.video_generators import DiffusionProcess, GeneratorSampler, find_generator
from foveal.zoo.tasks.video_report import save_generator as save_trained
from safetensors.torch import save_file
from tiny_latents import KINDS, drawn, save_generator, transformer, write_latents, write_wan
from train_helpers import assert_one_sentence, configure, differences
from video_files import write_video

ROOT = Path(__file__).resolve().parents[2]

PIPELINES = {
    "wan": (diffusers.WanPipeline, {}),
    "ltx": (diffusers.LTXPipeline, {}),
    "hunyuan": (diffusers.HunyuanVideoPipeline, {}),
    "cogvideox": (diffusers.CogVideoXPipeline, {}),
    "cogvideox15": (diffusers.CogVideoXPipeline, {}),
}
RUN = (
    "data=latents",
    "data.num_workers=0",
    "data.batch_size=2",
    "model=video",
    "model.preset=null",
    "model.conditioning=cross",
    "task=video",
    "task.scheduler=null",
    "callbacks=video",
    "callbacks.report.sample_every=0",
    "metric=val/loss",
    "trainer.max_epochs=2",
    "logger=none",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a pipeline and of a cache, by the kind of the transformer."""
    made = {}

    def folder(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            made[kind] = save_generator(root / "pipe", kind), write_latents(root / "latents", kind)
        return made[kind]

    return folder


def options(folders, kind, *more):
    pipe, latents = folders(kind)
    chosen = [f"model.pretrained={pipe}", f"data.root={latents}", f"task.null_text={latents}/empty.safetensors"]
    return [*RUN, *chosen, *more]


def build(run, folders, kind, *more):
    return train.build(configure(run, *options(folders, kind, *more), tiny=False))


def task_of(folders, kind, tmp_path, *more):
    _, task, data = build(tmp_path, folders, kind, *more)
    task.configure_model()
    task.log = lambda *args, **kwargs: None
    data.setup()
    return task, next(iter(data.train_dataloader()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_called_as_its_pipeline_calls_it(kind, folders):
    """Two guided steps of our sampler, which calls the model as training does, and of the pipeline of diffusers."""
    (pipe, _), (grid, width, length, scheduler) = folders(kind), KINDS[kind]
    generator = find_generator({"pretrained": str(pipe)}, lora=False)
    model = generator.make(None).eval()
    noise, text, none = drawn(1, 4, *grid, seed=5), drawn(1, length, width, seed=6), drawn(1, length, width, seed=7)
    seen = torch.ones(1, length, dtype=torch.bool)
    sampler = GeneratorSampler(
        generator, model, shape=(4, *grid),
        null_condition=lambda told: {"encoder_hidden_states": none, "encoder_attention_mask": seen},
    )  # fmt: skip
    same = torch.Generator().manual_seed(8)
    noise = torch.randn(4, *grid, generator=torch.Generator().manual_seed(8))[None]
    ours = sampler(
        prompt_embeds=text, prompt_attention_mask=seen, num_inference_steps=2, guidance_scale=3.0, generator=same
    ).frames

    make, empty = PIPELINES[kind][0], dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if kind == "hunyuan":
        empty |= {"text_encoder_2": None, "tokenizer_2": None}
    theirs = make(**empty, transformer=transformer(kind), scheduler=scheduler)
    theirs.set_progress_bar_config(disable=True)
    stride = (8, 32, 32) if kind == "ltx" else (4, 8, 8)
    frames, height, width = ((grid[0] - 1) * stride[0] + 1, *(n * s for n, s in zip(grid[1:], stride[1:], strict=True)))
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    call |= {"prompt_embeds": text, "negative_prompt_embeds": none, "latents": noise}
    if kind in ("ltx", "hunyuan"):
        call |= {"prompt_attention_mask": seen, "negative_prompt_attention_mask": seen}
    if kind == "ltx":
        call["latents"] = noise.flatten(2).transpose(1, 2)
    if kind == "hunyuan":
        call |= {"pooled_prompt_embeds": torch.zeros(1, 8), "negative_pooled_prompt_embeds": torch.zeros(1, 8)}
        call |= {"true_cfg_scale": 3.0}
    if kind.startswith("cogvideox"):
        call["latents"] = noise.transpose(1, 2)
    if kind == "wan":  # its pipeline pads texts to this length with zeros
        call |= {name: torch.nn.functional.pad(call[name], (0, 0, 0, 500)) for name in list(call) if "embeds" in name}
    made = theirs(height=height, width=width, num_frames=frames, **call).frames
    if kind == "ltx":
        made = made.transpose(1, 2).reshape(noise.shape)
    if kind.startswith("cogvideox"):
        made = made.transpose(1, 2)
    torch.testing.assert_close(ours, made, rtol=1e-4, atol=1e-5)
    assert (ours - noise).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(kind, folders, tmp_path):
    task, batch = task_of(folders, kind, tmp_path, "task.new_noise=false", "task.optimizer.lr=3e-3")
    optimizer = task.configure_optimizers()
    losses = []
    for _ in range(6):
        task.on_train_batch_start(batch, 0)
        loss = task.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_v_are_those_of_the_scheduler(kind):
    scheduler = diffusers.DDIMScheduler(prediction_type=kind, num_train_timesteps=50)
    process, video, noise = DiffusionProcess(scheduler), drawn(3, 2, 1, 4, 4), drawn(3, 2, 1, 4, 4, seed=1)
    t = torch.tensor([0.0, 0.51, 0.999])
    steps = process.timestep(t)
    assert steps.tolist() == [0, 25, 49] and process.timestep(torch.ones(1)).item() == 49
    torch.testing.assert_close(process.mix(video, noise, t), scheduler.add_noise(video, noise, steps))
    target = noise if kind == "epsilon" else scheduler.get_velocity(video, noise, steps)
    torch.testing.assert_close(process.target(video, noise, t), target)


def test_a_text_that_is_left_out_is_the_empty_prompt(folders, tmp_path):
    task, batch = task_of(folders, "wan", tmp_path)
    told = task.condition(batch, dropout=1.0)
    assert told["encoder_attention_mask"].tolist() == [[True] * 2 + [False] * 10] * 2
    torch.testing.assert_close(
        told["encoder_hidden_states"][:, :2], drawn(2, 16, seed=99).expand(2, -1, -1), atol=0, rtol=0
    )
    assert not told["encoder_hidden_states"][:, 2:].any()
    kept = task.condition(batch, dropout=0.0)
    assert torch.equal(kept["encoder_hidden_states"], batch["text"])


def test_a_plan_makes_layers_sparse_with_checkpointing_or_without(folders, tmp_path):
    """One batch, one draw of noise: the plan changes the loss and gradients, recomputing the blocks does not."""
    plan = "model.plan={window:[1,1,1]}"
    cases = {"dense": (), "sparse": (plan,), "again": (plan, "task.gradient_checkpointing=true")}
    losses, gradients = {}, {}
    for name, more in cases.items():
        task, batch = task_of(folders, "wan", tmp_path, *more)
        task.on_train_batch_start(batch, 0)
        losses[name] = task.training_step(batch, 0)
        losses[name].backward()
        gradients[name] = task.model.blocks[0].attn1.to_q.weight.grad
    torch.testing.assert_close(losses["again"], losses["sparse"])
    torch.testing.assert_close(gradients["again"], gradients["sparse"])
    assert not torch.allclose(losses["dense"], losses["sparse"], rtol=1e-4)
    # a query that sees one key does not matter
    assert gradients["sparse"].abs().max() < 1e-6 * gradients["dense"].abs().max()
    decelerate(task.model)


def test_adapters_are_loaded_by_the_pipeline(folders, tmp_path):
    trainer, task, data = build(
        tmp_path, folders, "wan", "task.lora={rank:2,alpha:4}", "task.optimizer.lr=0.01", "model.dtype=bfloat16",
        "callbacks.ema=null", "trainer.max_epochs=1", "trainer.limit_val_batches=1",
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    assert {p.dtype for p in task.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for name, p in task.model.named_parameters() if ".base_layer" in name} == {torch.bfloat16}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoints", "lora"]
    folder, _ = folders("wan")
    base = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=base, scheduler=KINDS["wan"][3]
    )
    given = {
        "hidden_states": drawn(1, 4, 3, 4, 4).bfloat16(),
        "timestep": torch.full((1,), 400.0),
        "encoder_hidden_states": drawn(1, 12, 16, seed=1).bfloat16(),
    }
    with torch.no_grad():
        plain, expected = pipe.transformer(**given).sample, task.model.eval()(**given).sample
        pipe.load_lora_weights(tmp_path / "lora")
        made = pipe.transformer(**given).sample
    torch.testing.assert_close(made, expected, rtol=0.02, atol=0.02)  # adapters are bfloat16 there
    assert (made - plain).abs().max() > 4 * (made - expected).abs().max()


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_and_its_model_trains_on(folders, tmp_path):
    def fit(run, steps=-1, checkpoint=None, *more):
        few = ("trainer.limit_val_batches=1", f"++trainer.max_steps={steps}", "model.plan={window:[1,3,3]}", *more)
        trainer, task, data = build(run, folders, "wan", *few)
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return task, dict(task.state_dict())

    (task, whole), (_, begun) = fit(tmp_path / "whole"), fit(tmp_path / "part", 2)
    _, resumed = fit(tmp_path / "part", checkpoint=tmp_path / "part" / "checkpoints" / "last.ckpt")
    assert differences(resumed, whole) == [] != differences(begun, whole)
    saved = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "whole" / "transformer").state_dict()
    assert differences(dict(saved), dict(task.model.state_dict())) == []
    again = find_generator({"pretrained": str(tmp_path / "whole")}, lora=False)
    assert type(again.scheduler).__name__ == "UniPCMultistepScheduler"


MISTAKES = [
    (["model.conditioning=class"], "needs data with classes"),
    (["model.conditioning=null"], "is told texts: pass model.conditioning=cross"),
    (["task.null_text=null"], "leaves out texts, which a WanTransformer3DModel knows as the empty prompt"),
    (["task.null_text=/no/such"], "task.null_text='/no/such' does not exist"),
    (["task.first_frame=0.5"], "task.first_frame=0.5 is for a VideoDiT"),
    (["task.time_per=frame"], "task.time_per='frame' is for a VideoDiT"),
    (["model.dtype=bfloat16"], "others lose small steps in it: set task.lora"),
    (["model.dtype=int8", "task.lora={rank:2}"], "model.dtype='int8' is not known"),
    (["model.args={frame_rate:8}"], "key of model.args of a WanTransformer3DModel"),
    (["model.plan={mask:nothing}"], "model.plan={'mask': 'nothing'}"),
    (["model.plan={window:3,dense_steps:2}"], "dense_steps=2 counts steps of a sampler"),
    (["task.lora={rank:2,targets:none}"], "task.lora.targets='none' fits none of the linear layers"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_get_one_sentence(arguments, sentence, folders, tmp_path, monkeypatch, capsys):
    fast = ["trainer.fast_dev_run=true", f"runs={tmp_path}"]
    assert_one_sentence([*options(folders, "wan"), *fast, *arguments], sentence, monkeypatch, capsys)


def test_models_that_cannot_be_trained_are_said(folders, tmp_path):
    pipe, _ = folders("wan")
    config = json.loads((pipe / "transformer" / "config.json").read_text())

    def refused(sentence, check=None, **changes):
        (tmp_path / "transformer").mkdir(exist_ok=True)
        (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=sentence):
            found = find_generator({"pretrained": str(tmp_path)}, lora=False)
            found.check_data(*(check or (4, 16)))

    refused(
        "is a MochiTransformer3DModel; trained are VideoDiT, WanTransformer3DModel",
        _class_name="MochiTransformer3DModel",
    )
    refused("takes more than noise and text .in_channels=8, out_channels=4", in_channels=8)
    refused("takes more than noise and text .*image_dim=4", image_dim=4)
    refused("takes latents of 4 channels, and the data have 16", (16, 16))
    refused("takes text of 16 channels, and the data have 8", (4, 8))
    refused("has no folder scheduler beside it", _class_name="CogVideoXTransformer3DModel")
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer_2": ["diffusers", "WanTransformer3DModel"]}))
    refused("has two transformers")


def test_long_texts_of_cogvideox_are_said(folders, tmp_path):
    task, batch = task_of(folders, "cogvideox", tmp_path)
    batch |= {"text": drawn(2, 7, 8), "text_mask": torch.ones(2, 7, dtype=torch.bool)}
    with pytest.raises(
        ValueError, match="texts of 7 tokens are too long for a CogVideoXTransformer3DModel, which takes 6"
    ):
        task.training_loss(batch)


@pytest.mark.slow
def test_the_commands_of_the_documentation_lead_to_adapters(tmp_path):
    """Those of docs/training.md as they are printed, with shorter clips, on a tiny random Wan and four videos."""
    write_wan(tmp_path / "wan")
    for i, split in enumerate(("train", "train", "train", "val")):
        (tmp_path / "clips" / split).mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "clips" / split / f"{i}.mp4", frames=12, fps=16, height=64, width=96, blue=60 * i)
        (tmp_path / "clips" / split / f"{i}.txt").write_text("a blue sky")
    page = (ROOT / "docs" / "training.md").read_text()
    section = page[page.index("### Wan, LTX") :]
    commands = section[section.index("```bash\n") + 8 :]
    lines = commands[: commands.index("\n```")].splitlines()
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.replace("--frames 81 --size 480x832", "--frames 9 --size 32x48"))
        words = [{"python": sys.executable, "train.py": str(ROOT / "train.py")}.get(word, word) for word in words]
        if "train.py" in line:
            words += ["trainer.accelerator=cpu", "trainer.max_epochs=2", "threads=1", "data.num_workers=0"]
            words += ["callbacks.report.steps=2"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    (run,) = (tmp_path / "runs" / "finetune_video").iterdir()
    assert (run / "samples.gif").is_file() and not (run / "transformer").exists()
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path / "wan")
    pipe.load_lora_weights(run / "lora")
    assert pipe.get_active_adapters()


def test_samples_of_a_run_need_no_pipeline(folders, tmp_path):
    """The report samples held-out texts and prompts of one's own, guided only where the empty prompt is known."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    save_file({"text": drawn(5, 16)}, tmp_path / "mine.safetensors")
    (tmp_path / "mine.csv").write_text("caption,embedding\nmine,mine.safetensors\n")
    more = [f"data.vae={tmp_path}/vae", f"callbacks.report.prompts={tmp_path}/mine.csv", "callbacks.report.steps=2"]
    more += ["callbacks.report.samples_per_class=1", "callbacks.ema=null"]
    trainer, task, data = build(tmp_path / "run", folders, "wan", *more)
    trainer.test(task, datamodule=data, verbose=False)
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"samples.gif", "prompts.gif", "metrics.json"} <= made
    save_trained(task, tmp_path / "out")
    assert (tmp_path / "out" / "transformer" / "config.json").is_file()
