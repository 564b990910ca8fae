"""Embeddings of captions: those of the encoder, once per caption, and a table that training reads."""

import json

import pytest
import torch
from foveal.zoo.data import VideoFolder
from foveal.zoo.data.texts import load_encoder, main
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
from typer.testing import CliRunner
from video_files import write_video

WORDS = ["<pad>", "</s>", "a", "red", "blue", "circle"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny random T5 with a tokenizer of words, as a pipeline has them."""
    folder = tmp_path_factory.mktemp("pipeline")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="</s>")
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = T5Config(vocab_size=6, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for split, name, caption in (
        ("train", "0", "a red circle"), ("train", "1", "a blue"), ("val", "2", "a red circle")
    ):  # fmt: skip
        (folder / split).mkdir(exist_ok=True)
        write_video(folder / split / f"{name}.mp4", frames=8, fps=8, height=32, width=32)
        (folder / split / f"{name}.txt").write_text(caption + "\n")
    return folder


def run(*arguments):
    import typer

    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_folder_with_captions_becomes_a_folder_with_embeddings(videos, encoder, tmp_path):
    out = tmp_path / "captions.csv"
    for _ in range(2):  # the second run finds all of them
        done = run(videos, out, "--encoder", encoder, "--length", 8, "--batch", 2, "--device", "cpu")
        assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "captions.embeddings").iterdir())
    assert len(files) == 2
    data = VideoFolder(
        root=str(videos), captions=str(out), batch_size=1, frames=4, sizes=[[16, 16]], text_length=5, num_workers=0
    )
    assert data.text_dim == 8
    data.setup()
    item = data.datasets["val"][0]
    model = T5EncoderModel.from_pretrained(encoder / "text_encoder").eval()
    expected = model(torch.tensor([[2, 3, 5]])).last_hidden_state[0]
    assert item["text_mask"].tolist() == [True] * 3 + [False] * 2
    torch.testing.assert_close(item["text"][:3], expected.detach(), rtol=1e-2, atol=1e-2)  # kept in bfloat16
    assert sorted(len(load_file(file)["text"]) for file in files) == [2, 3]


def test_padding_is_encoded_where_it_is_asked_for(encoder):
    model = T5EncoderModel.from_pretrained(encoder / "text_encoder").eval()
    encode, identity = load_encoder(encoder, length=5, device="cpu", padded=True)
    (text,) = encode(["a blue"])
    expected = model(torch.tensor([[2, 4, 0, 0, 0]]), attention_mask=torch.ones(1, 5)).last_hidden_state[0]
    torch.testing.assert_close(text, expected.detach())
    assert encode([""])[0].shape == (5, 8) and load_encoder(encoder, length=5, device="cpu")[1] != identity


def test_the_empty_prompt_is_kept_where_the_tokenizer_has_one(videos, encoder, tmp_path):
    for more, there in (((), False), (("--padded",), True)):
        out = tmp_path / f"{there}.csv"
        done = run(videos, out, "--encoder", encoder, "--length", 4, "--device", "cpu", *more)
        assert done.exit_code == 0, done.output
        assert (tmp_path / f"{there}.empty.safetensors").is_file() == there


def test_mistakes_get_one_sentence(videos, encoder, tmp_path):
    out = tmp_path / "captions.csv"
    for arguments, sentence in (
        ((videos, tmp_path / "captions.txt", "--encoder", encoder), "must be a .csv file"),
        ((videos, out, "--encoder", videos), "is neither the folder of a text encoder"),
        ((tmp_path / "none", out, "--encoder", encoder), "is not a folder"),
        ((videos, out, "--encoder", encoder, "--length", 0), "--length=0"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2 and sentence in done.output, done.output
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "t5"}))
    done = run(videos, out, "--encoder", broken)
    assert done.exit_code == 2 and "cannot be loaded" in done.output, done.output
