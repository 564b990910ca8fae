"""Two ranks share the tokens of `VideoDiT`s; each prints whether all samples equal those of one process."""

import diffusers
import torch
import torch.distributed as dist
from foveal.zoo import accelerate
from video_models import TEXT, letters, seeded, tiny_model, tiny_pipe

torch.accelerator.device_count = lambda: 1  # diffusers divides by it, also on CPU
dist.init_process_group("gloo")
WINDOW = {"type": "window", "window": [3, 2, 2]}
CAUSAL = [{"type": "dense", "causal": True}, WINDOW | {"causal": True}]
SPARSE = {"type": "sparse", "mask": "vsa", "options": {"block": [1, 2, 2]}, "budget": 0.5}


def degree(count: int = 2) -> diffusers.ContextParallelConfig:
    return diffusers.ContextParallelConfig(ulysses_degree=count)


def inputs(conditioning, frames=4):
    given = {"hidden_states": torch.randn(2, 1, frames, 8, 8, generator=seeded(1))}
    if conditioning == "class":
        return given | {"class_labels": torch.tensor([1, 2])}
    mask = torch.tensor([[True, True, False], [True, True, True]])
    text = torch.randn(2, 3, TEXT, generator=seeded(2))
    return given | {"encoder_hidden_states": text, "encoder_attention_mask": mask}


@torch.no_grad()
def check_models() -> None:
    """One time for a video, a frame and a token, of every conditioning, modulation and pattern."""
    for conditioning in ("class", "cross", "joint"):
        for config in (
            {"attention": ["dense", WINDOW]},
            {"attention": [SPARSE, "first"], "modulation": "td_ln"},
            {"attention": ["spatial", "temporal"], "gated_attention": True, "prediction": "video"},
        ):
            model, given = tiny_model(conditioning, **config), inputs(conditioning)
            times = [torch.tensor([300.0, 700.0]), torch.rand(2, 4) * 1000, torch.rand(2, 16) * 1000]
            for t in times:
                dist.broadcast(t, 0)
            expected = [model(timestep=t, **given).sample for t in times]
            model.enable_parallelism(config=degree())
            seen = []
            model.blocks[0].register_forward_pre_hook(lambda block, args, seen=seen: seen.append(args[0].shape[1]))
            for t, alone in zip(times, expected, strict=True):
                torch.testing.assert_close(model(timestep=t, **given).sample, alone)
            assert seen == [8] * 3  # of 16 tokens
    by_token = inputs("cross") | {"encoder_attention_mask": torch.ones(2, 16, 3, dtype=torch.bool)}
    by_token["encoder_attention_mask"][:, :8, 0] = False
    model, t = tiny_model("cross"), torch.tensor([300.0, 700.0])
    alone = model(timestep=t, **by_token).sample
    model.enable_parallelism(config=degree())
    torch.testing.assert_close(model(timestep=t, **by_token).sample, alone)


def check_pipelines() -> None:
    """A guided rollout with its caches, and a plan of `accelerate`."""
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    for told, config, more in (
        ({"class_labels": [1, 2]}, {"attention": CAUSAL}, {"chunk_frames": 2}),
        ({"prompt": ["a", "b"]}, {"conditioning": "joint", "text_encoder": letters}, {}),
    ):
        pipe = tiny_pipe(**config)
        alone = pipe(**told, **call, **more, generator=seeded()).frames
        pipe.transformer.enable_parallelism(config=degree())
        torch.testing.assert_close(pipe(**told, **call, **more, generator=seeded()).frames, alone)
    pipe = tiny_pipe()
    with accelerate(pipe, {"window": 3}):
        alone = pipe(class_labels=1, **call, generator=seeded()).frames
    pipe.transformer.enable_parallelism(config=degree())
    with accelerate(pipe, {"window": 3}):
        torch.testing.assert_close(pipe(class_labels=1, **call, generator=seeded()).frames, alone)


def check_errors() -> None:
    model = tiny_model(patch_size=(1, 8, 8))
    model.enable_parallelism(config=degree())
    t = torch.tensor([300.0, 700.0])
    for change, given, sentence in (
        (lambda: None, inputs("class", frames=3), "must divide the 3 tokens of the video"),
        (model.train, inputs("class"), "enable_parallelism is for sampling"),
    ):
        change()
        try:
            model(timestep=t, **given)
        except ValueError as error:
            assert sentence in str(error), error
        else:
            raise AssertionError(sentence)


check_models()
check_pipelines()
check_errors()
dist.destroy_process_group()
print("equal")
