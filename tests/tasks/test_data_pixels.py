"""Pixels of every mode as 8-bit RGB or grey, and transforms that end with an image whatever they draw."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.zoo.data import ImageFolder
from foveal.zoo.data.augment import make_transform
from foveal.zoo.data.pixels import UnreadableImage, read_image, to_mode
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from PIL import Image, ImageCms
from timm.data import create_transform

RAMP = np.arange(16, dtype=np.uint8)[None].repeat(4, axis=0) * 17  # 0 to 255
RED, BLUE = (200, 30, 40), (10, 60, 220)


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def grey(path: Path, mode: str = "RGB") -> list[int]:
    """The first row of an image whose pixels are grey."""
    pixels = np.asarray(read_image(path, mode))
    assert pixels.dtype == np.uint8 and pixels.ndim == {"RGB": 3, "L": 2}[mode]
    if mode == "RGB":
        assert (pixels == pixels[..., :1]).all()
        pixels = pixels[..., 0]
    return pixels[0].tolist()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("8.png", RAMP),
        ("16.png", RAMP.astype(np.uint16) * 257),
        ("16.tif", RAMP.astype(np.uint16) * 257),
        ("32.tif", RAMP.astype(np.int32) * 257),
        ("16.pgm", RAMP.astype(np.int32) * 257),
        ("float.tif", RAMP.astype(np.float32) / 255),
    ],
)
def test_the_whole_range_of_grey_goes_to_eight_bits(tmp_path, name, pixels, mode):
    assert grey(saved(Image.fromarray(pixels), tmp_path / name), mode) == RAMP[0].tolist()


def test_big_endian_and_rounding(tmp_path):
    big = Image.frombytes("I;16B", (3, 1), np.array([[0, 128, 65535]], dtype=">u2").tobytes())
    assert np.asarray(to_mode(big, "L")).tolist() == [[0, 0, 255]]
    little = Image.fromarray(np.array([[129, 385, 386]], dtype=np.uint16))
    assert np.asarray(to_mode(little, "L")).tolist() == [[1, 1, 2]]


@pytest.mark.parametrize(
    ("name", "pixels", "reason"),
    [
        ("hounsfield.tif", np.array([[-1000, 3000]], dtype=np.int32), "its integers from -1000 to 3000 are no 16-bit"),
        ("wide.tif", np.array([[0, 70000]], dtype=np.int32), "its integers from 0 to 70000 are no 16-bit pixels"),
        ("metres.tif", np.array([[0, 1.5]], dtype=np.float32), r"its floats from 0 to 1\.5 are no pixels \(0 to 1\)"),
        ("nan.tif", np.array([[0, np.nan]], dtype=np.float32), "its floats from nan to nan are no pixels"),
    ],
)
def test_values_that_are_no_pixels_are_refused_by_name(tmp_path, name, pixels, reason):
    with pytest.raises(UnreadableImage, match=rf"{name}: {reason}"):
        read_image(saved(Image.fromarray(pixels), tmp_path / name))


def test_transparency_is_laid_over_white(tmp_path):
    clear = Image.new("RGBA", (3, 1), (*RED, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    clear.putpixel((2, 0), (0, 0, 0, 128))
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    keyed = Image.new("RGB", (2, 1), RED)
    keyed.putpixel((1, 0), BLUE)
    files = {
        "rgba.png": (clear, {}, [RED, (255, 255, 255), (127, 127, 127)]),
        "la.png": (clear.convert("LA"), {}, [(82, 82, 82), (255, 255, 255), (127, 127, 127)]),
        "rgba.webp": (clear, {"lossless": True, "exact": True}, [RED, (255, 255, 255), (127, 127, 127)]),
        "palette.png": (palette, {"transparency": 1}, [RED, (255, 255, 255)]),
        "palette.gif": (palette, {"transparency": 1}, [RED, (255, 255, 255)]),
        "opaque.png": (palette, {}, [RED, BLUE]),
        "keyed.png": (keyed, {"transparency": BLUE}, [RED, (255, 255, 255)]),
    }
    for name, (image, options, expected) in files.items():
        found = np.asarray(read_image(saved(image, tmp_path / name, **options)))[0]
        assert [tuple(pixel) for pixel in found.tolist()] == expected, name
    assert grey(tmp_path / "rgba.png", "L") == [82, 255, 127]


def test_other_modes(tmp_path):
    bits = Image.fromarray(RAMP > 127)
    assert bits.mode == "1" and grey(saved(bits, tmp_path / "bits.png")) == [0] * 8 + [255] * 8
    inked = Image.new("CMYK", (16, 16), (0, 215, 200, 20))  # a printer's red
    for name, options in (("cmyk.jpg", {"quality": 100}), ("cmyk.tif", {})):
        red, green, blue = np.asarray(read_image(saved(inked, tmp_path / name, **options)))[8, 8].tolist()
        assert abs(red - 235) < 8 and green < 55 and blue < 70, name
    colour = Image.new("RGB", (4, 4), RED)
    for mode in ("HSV", "YCbCr"):
        assert np.abs(np.asarray(to_mode(colour.convert(mode), "RGB")).astype(int) - RED).max() <= 3
    srgb, lab = (ImageCms.createProfile(space) for space in ("sRGB", "LAB"))
    in_lab = ImageCms.applyTransform(colour, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    found = np.asarray(read_image(saved(in_lab, tmp_path / "lab.tif")))
    assert np.abs(found.astype(int) - RED).max() <= 3
    with pytest.raises(ValueError, match="conversion from La"):
        to_mode(Image.new("La", (4, 4)), "RGB")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_images_are_turned_as_their_exif_says(tmp_path, orientation, suffix):
    """A camera that was held otherwise stores what it saw and the way up."""
    upright = Image.new("L", (24, 16), 0)
    upright.paste(255, (0, 0, 8, 8))  # white in the upper left corner
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # from upright to as it is stored
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x112] = orientation
    path = saved(stored.convert("RGB"), tmp_path / f"x.{suffix}", exif=exif)
    found = np.asarray(read_image(path, "L"))
    assert found.shape == (16, 24)
    assert found[2:6, 2:6].min() > 200 and found[:, 12:].max() < 50 and found[12:].max() < 50


def test_a_damaged_exif_block_turns_nothing(tmp_path):
    path = saved(
        Image.new("RGB", (8, 6), RED), tmp_path / "x.jpg", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff\x00\x01"
    )
    assert read_image(path).size == (8, 6)


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\nrubbish", b"GIF89a", b"BM" + bytes(60), b"\xff\xd8\xff\xe0"]
)
def test_what_decoders_raise_names_the_file(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"x\.png: \w"):
        read_image(tmp_path / "x.png")


def test_a_file_that_is_gone_or_closed(tmp_path):
    with pytest.raises(UnreadableImage, match=r"x\.png: No such file"):
        read_image(tmp_path / "x.png")
    with pytest.raises(UnreadableImage, match=r"Is a directory"):
        read_image(tmp_path)


def test_bombs_are_refused(tmp_path, monkeypatch):
    path = saved(Image.new("1", (600, 600)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match=r"bomb\.png: .*decompression bomb"):
        read_image(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_folders_give_as_many_channels_as_there_are_means(tmp_path, channels):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number, mode in enumerate(("L", "RGB", "RGBA", "P", "1", "I;16", "LA", "CMYK")):
                Image.new(mode, (20, 20)).save(
                    tmp_path / split / name / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}"
                )
    values = {"mean": (0.5,) * channels, "std": (0.5,) * channels}
    data = ImageFolder(root=str(tmp_path), batch_size=8, img_size=16, num_workers=0, **values)
    data.setup()
    assert data.for_task["in_chans"] == channels
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert {images.shape for images, _ in loader} == {(8, channels, 16, 16)}


POLICIES = [
    "rand-m9-mstd0.5-inc1",  # of most recipes; asked for none of the bits from time to time
    "rand-m10-inc1",  # every time
    "rand-m10-n3-p1-mstd101-inc1",  # TrivialAugment: a magnitude at random
    "rand-m0-n3-p1",
    "rand-m9-mstd0.5-inc1-tweights",
    "rand-m9-mstd0.5-inc1-t3aw",
    "augmix-m10-w2-mstd1",
    "augmix-m3-b1",
    "v0-mstd0.5",
    "v0r",
    "original-mstd0.5",
    "originalr",
    "3a",
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_draw_of_every_policy_ends_with_an_image(policy, channels):
    """`posterize` to no bits was one in three hundred."""
    values = {"mean": (0.5,) * channels, "std": (0.5,) * channels, "mode": "RGB" if channels == 3 else "L"}
    options = {"auto_augment": policy, "re_prob": 0.5, "re_mode": "pixel"}
    transform = make_transform(options, size=16, is_training=True, **values)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).convert(
        values["mode"]
    )
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    for _ in range(150):
        assert transform(image).shape == (channels, 16, 16)


def test_the_defaults_are_safe_in_timm_itself():
    """Whoever copies them does not have our `posterize`."""
    with initialize_config_module("foveal.configs", version_base="1.3"):
        configs = [
            compose("train", overrides=["data=imagefolder"]).data,
            compose("train", overrides=["data=timm", "data.name=x", "data.num_classes=2"]).data,
            compose("train", overrides=["experiment=finetune", "model.name=resnet18"]).data,
        ]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8))
    for config in configs:
        options = OmegaConf.to_container(config.train_transform)
        operations = create_transform(16, is_training=True, **options).transforms[2].ops
        (posterize,) = (op for op in operations if op.name == "PosterizeIncreasing")
        random.seed(0)
        posterize.prob = 1.0
        for _ in range(1000):
            posterize(image)


def test_strongest_posterize_keeps_a_bit():
    transform = make_transform(
        {"auto_augment": "rand-m10-inc1", "hflip": 0.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)},
        size=16,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        mode="RGB",
        is_training=True,
    )
    (posterize,) = (op for op in transform.transforms[2].ops if op.name == "PosterizeIncreasing")
    posterize.prob = 1.0
    assert set(np.asarray(posterize(Image.fromarray(RAMP))).ravel().tolist()) == {0, 128}
