"""Trains small digit generators, steers them with `foveal.zoo.Control`, measures it, and draws pictures.

    python examples/steer_digits.py train          # four models into runs/steer_digits, 40 minutes of a core in all
    python examples/steer_digits.py train pairs    # one of them
    python examples/steer_digits.py measure        # prints numbers
    python examples/steer_digits.py draw           # docs/images/steer/*

Needs scikit-learn (its scans of digits are the data), Pillow and matplotlib. The path takes half an hour of processor
time (after 1,500 steps of 8 clips digits keep to it, and 29 % their shape), the others 1 to 3 minutes. `measure`
printed, seeds as they are here, torch 2.14, one thread:

    judge: right on 98.1 % of held-out scans
    regions, not bound: both digits 100 %, each in its region 0 %
    regions, bound: both digits 100 %, each in its region 100 %
    path, not bound: 4.0 pixels off the path, within 2 pixels in 16 % of frames; the digit is right in 75 %
    path, bound: 1.0 pixels off the path, within 2 pixels in 92 % of frames; the digit is right in 80 %
    first frame itself: the judge reads its digit in 98 %
    first frame, first layers: last frame shows its digit in 98 %, cosine to the first frame 0.999
    first frame, spatial layers: last frame shows its digit in 18 %, cosine to the first frame 0.689
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from foveal.zoo.control import Control, Where, edits, heatmap, recipes
from foveal.zoo.data.digits import split_digits
from foveal.zoo.video import VideoDiT, VideoDiTPipeline
from foveal.zoo.video.flow import TIMESTEPS, add_noise, flow_loss, sample_time, velocity
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, max_pool2d, one_hot

ROOT = Path(__file__).resolve().parents[1]
RUNS, IMAGES = ROOT / "runs" / "steer_digits", ROOT / "docs" / "images" / "steer"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = ("and", *DIGITS)  # "and" stands for what is no digit
SIDE, MEAN, STD = 8, 0.14, 0.3  # pixels of a scan; mean and deviation of canvases
HEIGHT, WIDTH, PATCH = 8, 16, 2  # of a picture of two digits, and of its tokens
CANVAS, FRAMES = 16, 8  # of a clip along a path
SHORT = 4  # frames of a clip behind its first one
PEAK = 2e-3  # of the learning rate
STEPS, SCALE = 25, 2.5  # of sampling, and of its guidance
CROSS = {("image", "entity"): "region", ("image", "text"): "all"}  # digits' words in their regions, "and" everywhere


# data


def scans(split: str) -> tuple[Tensor, Tensor]:
    """Scans `[N, 8, 8]` in 0..1 and their digits."""
    from sklearn.datasets import load_digits

    numbers, labels = split_digits()[split]
    return torch.from_numpy(load_digits().images[numbers] / 16).float(), torch.tensor(labels)


def put(canvas: Tensor, digits: Tensor, top: Tensor, left: Tensor) -> None:
    """Draws a digit `[B, 8, 8]` into each canvas `[B, H, W]` at its place."""
    rows = top[:, None, None] + torch.arange(SIDE)[:, None]
    columns = left[:, None, None] + torch.arange(SIDE)
    canvas[torch.arange(len(canvas))[:, None, None], rows, columns] = digits


def encode(ids: Tensor, places: int = 0) -> Tensor:
    """Words `[B, L]` as one-hot vectors, with their places behind where there are places."""
    words = one_hot(ids, len(VOCABULARY)).float()
    if not places:
        return words
    return torch.cat([words, one_hot(torch.arange(ids.shape[1]), places).float().expand(len(ids), -1, -1)], -1)


def pairs(count: int, images: Tensor, labels: Tensor, *, bound: float) -> dict[str, Tensor]:
    """Two different digits side by side, named from left to right; a share in any order, words seen in their halves."""
    left = torch.randint(len(images), (count,))
    other = torch.randint(len(images), (4, count))
    right = other[(labels[other] != labels[left]).float().argmax(0), torch.arange(count)]
    video = torch.cat([images[left], images[right]], -1)
    words = torch.stack([labels[left], torch.full_like(left, -1), labels[right]], 1)
    free = torch.rand(count) >= bound
    swapped = (torch.rand(count) < 0.5) & ~free
    words[swapped] = words[swapped].flip(1)
    columns = WIDTH // PATCH
    sees = torch.ones(count, HEIGHT // PATCH, columns, 3, dtype=torch.bool)
    half = torch.arange(columns) < columns // 2
    sees[..., 0] = (half ^ swapped[:, None, None]) | free[:, None, None]
    sees[..., 2] = (~half ^ swapped[:, None, None]) | free[:, None, None]
    return {"video": video[:, None, None], "text": encode(words + 1, places=3), "mask": sees.flatten(1, 2)}


def paths(count: int, *, circles: float = 0.5) -> Tensor:
    """Places (top, left) of a digit in each frame, `[B, frames, 2]`: lines that bounce, and pieces of circles."""
    room, t = CANVAS - SIDE, torch.arange(FRAMES)
    line = torch.rand(count, 1, 2) * room + t[:, None] * (torch.rand(count, 1, 2) - 0.5) * 5
    line = (line % (2 * room)).sub(room).abs().neg().add(room)
    turn = torch.rand(count, 1) * 2 * math.pi + t * (torch.rand(count, 1) - 0.5) * 2
    circle = room / 2 + (room / 2 * (0.5 + 0.5 * torch.rand(count, 1, 1))) * torch.stack([turn.sin(), turn.cos()], -1)
    round_ = torch.rand(count, 1, 1) < circles
    return torch.where(round_, circle, line).round().long().clamp(0, room)


def track(path: Tensor) -> Tensor:
    """Tokens of the moving box, bool `[B, frames, 4, 4]`: patches of 4 x 4 pixels that it touches."""
    boxes = torch.zeros(*path.shape[:2], CANVAS, CANVAS)
    flat = boxes.flatten(0, 1)
    put(flat, torch.ones(len(flat), SIDE, SIDE), *path.flatten(0, 1).unbind(-1))
    return max_pool2d(flat[:, None], 4)[:, 0].unflatten(0, path.shape[:2]) > 0


def moving(count: int, images: Tensor, labels: Tensor, *, bound: float) -> dict[str, Tensor]:
    """One digit on a path; for a share of the clips its word is seen along the path alone."""
    which, path = torch.randint(len(images), (count,)), paths(count)
    video = torch.zeros(count * FRAMES, CANVAS, CANVAS)
    put(video, images[which].repeat_interleave(FRAMES, 0), *path.flatten(0, 1).unbind(-1))
    text = encode(torch.stack([torch.zeros_like(which), labels[which] + 1], 1))
    sees = torch.ones(count, FRAMES, CANVAS // 4, CANVAS // 4, 2, dtype=torch.bool)
    sees[..., 1] = track(path) | (torch.rand(count, 1, 1, 1) >= bound)
    return {"video": video.unflatten(0, (count, 1, FRAMES)), "text": text, "mask": sees.flatten(1, 3)}


def behind(count: int, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """One digit whose brightness changes, without any text: the first frame says which."""
    which, light = torch.randint(len(images), (count,)), 0.4 + 0.6 * torch.rand(count, SHORT, 1, 1)
    light[:, 0] = 1
    return {"video": (light * images[which][:, None])[:, None], "label": labels[which]}


# models


class Words:
    """A tokenizer of the vocabulary, one token a word."""

    def encode(self, text: str) -> list[int]:
        return [VOCABULARY.index(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return VOCABULARY[ids[0]]

    def __call__(self, texts: list[str], **options) -> SimpleNamespace:
        ids = torch.tensor([self.encode(text) for text in texts])
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


class Encoder:
    """A text encoder without weights; see `encode`."""

    def __init__(self, places: int):
        self.places = places

    def __call__(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        return (encode(ids, self.places),)


TEXT = {"conditioning": "cross", "text_dim": len(VOCABULARY)}
PAIRS = {"conditioning": "cross", "text_dim": len(VOCABULARY) + 3, "patch_size": (1, PATCH, PATCH)}
# name: (options of the model, batches, steps, batch size)
MODELS: dict[str, tuple[dict, Callable, int, int]] = {
    "pairs": (PAIRS, lambda n, *x: pairs(n, *x, bound=0.5), 2200, 16),
    "path": (TEXT | {"patch_size": (1, 4, 4)}, lambda n, *x: moving(n, *x, bound=0.5), 9000, 16),
    "first": ({"patch_size": (1, 2, 2), "attention": ("first", "spatial")}, behind, 600, 16),
    "spatial": ({"patch_size": (1, 2, 2), "attention": ("spatial",)}, behind, 600, 16),
}


def train(name: str) -> None:
    """Trains a model by rectified flow and saves the average of its weights."""
    options, make, steps, size = MODELS[name]
    torch.manual_seed(0)
    model = VideoDiT.from_preset("nano", **options).train()
    average = {key: x.clone() for key, x in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.01, betas=(0.9, 0.99))
    images, labels = scans("train")
    began, running = time.process_time(), 0.0
    for step in range(steps):
        scale = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = PEAK * scale
        batch = make(size, images, labels)
        video = (batch["video"] - MEAN) / STD
        t = sample_time((size,), shift=2.0)
        condition, weight = {}, None
        if "text" in batch:
            dropped = torch.rand(size) < 0.1
            condition["encoder_hidden_states"] = batch["text"].masked_fill(dropped[:, None, None], 0)
            condition["encoder_attention_mask"] = batch["mask"]
        else:  # the first frame is clean
            t = t[:, None].repeat(1, SHORT)
            weight = torch.ones_like(t)
            t[:, 0] = weight[:, 0] = 0
        noise = torch.randn_like(video)
        prediction = model(add_noise(video, noise, t), TIMESTEPS * t, **condition).sample
        loss = flow_loss(prediction, velocity(video, noise), weight=weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(0.998, step / (step + 10))
        for key, x in model.state_dict().items():
            average[key].lerp_(x, 1 - keep)
        running += (float(loss.detach()) - running) * (0.01 if step > 100 else 0.1)
        if step % 200 == 199 or step == steps - 1:
            print(f"{name} {step + 1}/{steps}: loss {running:.3f}, {time.process_time() - began:.0f} s", flush=True)
    model.load_state_dict(average)
    model.eval().save_pretrained(RUNS / name)


def pipeline(name: str) -> VideoDiTPipeline:
    """The pipeline of a trained model."""
    folder = RUNS / name
    if not folder.exists():
        raise SystemExit(f"{folder} is not there; run: python examples/steer_digits.py train {name}")
    model = VideoDiT.from_pretrained(folder).eval()
    text = {}
    if model.config.conditioning:
        text = {"text_encoder": Encoder(model.config.text_dim - len(VOCABULARY)), "tokenizer": Words()}
    made = VideoDiTPipeline(
        model, FlowMatchEulerDiscreteScheduler(shift=2.0), pixel_mean=[MEAN], pixel_std=[STD], null_text="zeros", **text
    )
    made.set_progress_bar_config(disable=True)
    return made


def sample(pipe: VideoDiTPipeline, prompts: list[str] | None, size: tuple[int, int, int], **options) -> Tensor:
    """Clips `[B, frames, H, W]` in 0..1."""
    frames, height, width = size
    sizes = {"num_frames": frames, "height": height, "width": width}
    call = {"num_inference_steps": STEPS, "output_type": "pt"} | sizes | options
    if prompts is not None:
        call = {"prompt": prompts, "guidance_scale": SCALE} | call
    return pipe(**call).frames[:, :, 0]


# measures


def judge() -> Callable[[Tensor], Tensor]:
    """Reads digits `[N, 8, 8]`: a support vector machine, whose accuracy on held-out scans is printed."""
    from sklearn.svm import SVC

    images, labels = scans("train")
    machine = SVC(gamma=0.001 * 256).fit(images.flatten(1).numpy(), labels.numpy())
    held, truth = scans("test")
    print(f"judge: right on {100 * machine.score(held.flatten(1).numpy(), truth.numpy()):.1f} % of held-out scans")
    return lambda x: torch.from_numpy(machine.predict(x.flatten(1).numpy()))


def find_digit(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 x 8 window of most ink in each picture `[N, H, W]`, centered, and its place (top, left)."""
    windows = pictures.unfold(1, SIDE, 1).unfold(2, SIDE, 1)  # [N, rows, columns, 8, 8]
    # ink near the border counts less, so that the window centers on the digit
    edge = torch.hann_window(SIDE + 2, periodic=False)[1:-1]
    score = (windows * (edge[:, None] * edge + 0.2)).sum((-2, -1)).flatten(1)
    best = score.argmax(1)
    columns = windows.shape[2]
    chosen = windows.flatten(1, 2)[torch.arange(len(pictures)), best]
    return chosen, torch.stack([best // columns, best % columns], 1)


def halves() -> Tensor:
    """Masks of the left and the right half, `[2, height, width]`."""
    left = torch.zeros(HEIGHT, WIDTH)
    left[:, : WIDTH // 2] = 1
    return torch.stack([left, 1 - left])


def bind(words: tuple[str, ...], regions: Tensor) -> edits.Visible:
    """Words that are seen in their regions alone."""
    return edits.Visible(CROSS, regions, words, where=Where(kinds=("cross",)))


def measure_regions(read: Callable, count: int = 25, prompts: int = 6) -> None:
    """Two digits bound to two regions: what is named first goes to the right."""
    generator = torch.Generator().manual_seed(1)
    wanted = [tuple(torch.randperm(10, generator=generator)[:2].tolist()) for _ in range(prompts)]
    pipe = pipeline("pairs")
    for bound in (False, True):
        right = both = 0.0
        for a, b in wanted:
            prompt = f"{DIGITS[a]} and {DIGITS[b]}"
            words = {"first": (prompt, DIGITS[a]), "second": (prompt, DIGITS[b])}
            found = [bind(("first", "second"), halves().flip(0))] if bound else []
            with Control(pipe, *found, words=words):
                clips = sample(pipe, [prompt] * count, (1, HEIGHT, WIDTH), generator=generators(count))
            seen = [read(find_digit(half)[0]) for half in clips[:, 0].split(WIDTH // 2, -1)]
            right += float(((seen[0] == b) & (seen[1] == a)).float().mean()) / len(wanted)
            pair = torch.stack(seen, 1).sort(1).values
            both += float((pair == torch.tensor(sorted((a, b)))).all(1).float().mean()) / len(wanted)
        how = "bound" if bound else "not bound"
        print(f"regions, {how}: both digits {100 * both:.0f} %, each in its region {100 * right:.0f} %", flush=True)


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def measure_path(read: Callable, count: int = 8, routes: int = 8) -> None:
    """A digit that follows a path: distance of its center from that of the box, in pixels."""
    pipe = pipeline("path")
    torch.manual_seed(2)
    ways = torch.cat([paths(routes // 2, circles=0.0), paths(routes // 2, circles=1.0)])
    for bound in (False, True):
        far = near = right = 0.0
        for number, way in enumerate(ways):
            digit = number % 10
            prompt = f"and {DIGITS[digit]}"
            found = [bind(("digit",), track(way[None]).float())] if bound else []
            with Control(pipe, *found, words={"digit": (prompt, DIGITS[digit])}):
                clips = sample(pipe, [prompt] * count, (FRAMES, CANVAS, CANVAS), generator=generators(count))
            shown, place = find_digit(clips.flatten(0, 1))
            distance = (place.unflatten(0, (count, FRAMES)) - way).float().norm(dim=-1)
            far += float(distance.mean()) / len(ways)
            near += float((distance <= 2).float().mean()) / len(ways)
            right += float((read(shown) == digit).float().mean()) / len(ways)
        print(
            f"path, {'bound' if bound else 'not bound'}: {far:.1f} pixels off the path, within 2 pixels in "
            f"{100 * near:.0f} % of frames; the digit is right in {100 * right:.0f} %",
            flush=True,
        )


def measure_first(read: Callable, count: int = 100) -> None:
    """A first frame that is kept: the last frame shows its digit."""
    images, labels = scans("test")
    torch.manual_seed(3)
    batch = behind(count, images, labels)
    given = batch["video"][:, :, 0]
    print(f"first frame itself: the judge reads its digit in {100 * same(read(given[:, 0]), batch['label']):.0f} %")
    for name in ("first", "spatial"):
        size, options = (SHORT, SIDE, SIDE), {"num_videos_per_prompt": count, "generator": generators(count)}
        clips = sample(pipeline(name), None, size, image=given, **options)
        last = clips[:, -1] / clips[:, -1].amax((-2, -1), keepdim=True).clamp(min=0.1)
        likeness = cosine_similarity(last.flatten(1), given.flatten(1)).mean()
        print(
            f"first frame, {name} layers: last frame shows its digit in "
            f"{100 * same(read(last), batch['label']):.0f} %, cosine to the first frame {float(likeness):.3f}",
            flush=True,
        )


def same(a: Tensor, b: Tensor) -> float:
    return float((a == b).float().mean())


# pictures


def draw() -> None:
    """Writes the pictures."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    draw_words()
    draw_swaps()
    draw_regions()
    draw_path()


def tiles(rows: list[list[np.ndarray]], titles: list[str], names: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(rows), len(rows[0]), figsize=(1.9 * len(rows[0]), 1.1 * len(rows) + 0.3), squeeze=False
    )
    for line, row, title in zip(axes, rows, titles, strict=True):
        for axis, picture in zip(line, row, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(path)


def draw_words() -> None:
    """Maps of words over a picture."""
    from foveal.zoo.control.plot import overlay

    pipe = pipeline("pairs")
    call = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "num_frames": 1, "height": HEIGHT, "width": WIDTH}
    image, maps = heatmap(
        pipe, "three and eight", ["three", "and", "eight"], generator=torch.Generator().manual_seed(4), **call
    )
    picture = np.repeat(np.asarray(image[0])[..., :1].clip(0, 1), 3, -1)
    overlay(picture, maps, IMAGES / "words.png")
    print(IMAGES / "words.png")


def draw_swaps() -> None:
    """Prompt-to-Prompt: one word swapped, the rest of the picture stays."""
    pipe, source = pipeline("pairs"), "three and eight"
    targets = ["three and six", "three and four", "two and eight"]
    rows, titles = [], ["new prompt, same noise", "Prompt-to-Prompt"]
    for steered in (False, True):
        row = []
        for target in targets:
            edit = recipes.prompt_to_prompt(
                source, target, tokenizer=pipe.tokenizer, steps=STEPS, length=3, cross=0.6, self_attention=0.3,
                self_scales=(1,),
            )  # fmt: skip
            with Control(pipe, *([edit] if steered else []), branches=("source", "target")) as control:
                noise = control.same_noise(seed=4)
                clips = sample(pipe, [source, target], (1, HEIGHT, WIDTH), generator=noise)
            row = [*row, clips[1, 0].numpy()] if row else [clips[0, 0].numpy(), clips[1, 0].numpy()]
        rows.append(row)
    tiles(rows, titles, [source, *targets], IMAGES / "prompt_to_prompt.png")


def draw_regions() -> None:
    """Words bound to halves, in both orders."""
    pipe, prompt = pipeline("pairs"), "three and seven"
    words = {"three": (prompt, "three"), "seven": (prompt, "seven")}
    rows, titles = [], ["not bound", "three left", "three right"]
    for order in (None, ("three", "seven"), ("seven", "three")):
        found = [] if order is None else [bind(order, halves())]
        with Control(pipe, *found, words=words):
            clips = sample(pipe, [prompt] * 5, (1, HEIGHT, WIDTH), generator=generators(5, seed=20))
        rows.append([clip[0].numpy() for clip in clips])
    tiles(rows, titles, [f"seed {20 + i}" for i in range(5)], IMAGES / "regions.png")


def draw_path() -> None:
    """A GIF: the box that moves on a circle, and digits that are bound to it."""
    from PIL import Image, ImageDraw

    pipe = pipeline("path")
    turn = torch.arange(FRAMES) / FRAMES * 2 * math.pi
    way = (4 + 4 * torch.stack([-turn.cos(), turn.sin()], -1)).round().long().clamp(0, CANVAS - SIDE)
    shown = (3, 5, 8)
    pictures = []
    for digit in shown:
        prompt = f"and {DIGITS[digit]}"
        with Control(pipe, bind(("digit",), track(way[None]).float()), words={"digit": (prompt, DIGITS[digit])}):
            pictures.append(sample(pipe, [prompt], (FRAMES, CANVAS, CANVAS), generator=generators(1, seed=5))[0])
    zoom, gap, frames = 8, 8, []
    for t in range(FRAMES):
        page = Image.new("RGB", (len(shown) * (CANVAS * zoom + gap) - gap, CANVAS * zoom), "white")
        for i, clip in enumerate(pictures):
            grey = (clip[t].clamp(0, 1) * 255).byte().numpy()
            tile = Image.fromarray(grey).resize((CANVAS * zoom,) * 2, Image.Resampling.NEAREST).convert("RGB")
            top, left = (int(x) * zoom for x in way[t])
            ImageDraw.Draw(tile).rectangle((left, top, left + SIDE * zoom - 1, top + SIDE * zoom - 1), outline="orange")
            page.paste(tile, (i * (CANVAS * zoom + gap), 0))
        frames.append(page)
    IMAGES.mkdir(parents=True, exist_ok=True)
    frames[0].save(IMAGES / "path.gif", save_all=True, append_images=frames[1:], duration=180, loop=0)
    print(IMAGES / "path.gif")


def main(arguments: list[str]) -> None:
    command, *names = arguments or [""]
    if command not in ("train", "measure", "draw") or set(names) - set(MODELS):
        raise SystemExit(f"{__doc__}\nModels: {', '.join(MODELS)}")
    if command == "train":
        for name in names or MODELS:
            train(name)
    elif command == "measure":
        read = judge()
        measure_regions(read)
        measure_path(read)
        measure_first(read)
    else:
        draw()


if __name__ == "__main__":
    main(sys.argv[1:])
