"""Prompts of vision transformers: the official block, neutral prompts, frozen trunks."""

import copy
import pickle

import pytest
import timm
import torch
from foveal.zoo.prompts import KINDS, MatchedPrompts, PromptedBlock, add_prompts, matching_loss, prompts_of
from recorded_modules import draw, fill, noise, recorded
from timm.models.vision_transformer import Block
from torch.nn import functional as F

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
SMALL = {
    "vpt": {"length": 4},
    "vfpt": {"length": 4},
    "tcpa": {"pool_cls": 4, "pool_image": 3, "topk_cls": 2, "topk_image": 2},
}


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **VIT | options).double()


def test_matched_prompts_recorded():
    block = fill(Block(768, 12, qkv_bias=True, norm_layer=lambda dim, **dd: torch.nn.LayerNorm(dim, eps=1e-6)).double())
    sizes = {"pool_cls": 6, "pool_image": 5, "length_cls": 2, "length_image": 1, "topk_cls": 3, "topk_image": 2}
    prompts = block.prompts = MatchedPrompts(768, **sizes).double()
    block.__class__ = PromptedBlock
    for pool in ("cls", "image"):
        for part in ("keys", "prompts"):
            target = getattr(prompts, f"{part}_{pool}")
            drawn = torch.from_numpy(draw(f"Pool_{pool}.{part}", (12, *target.shape)))  # of 12 layers
            target.data.copy_(drawn[3])
    x, z = noise((2, 197, 768), 12), recorded("tcpa_block_tdvp")
    with torch.no_grad():
        out = block(x)
        torch.testing.assert_close(out.flatten()[::101], z["y"], rtol=1e-9, atol=1e-9)
        _, allowed = prompts.train()(x)
    assert (allowed == z["mask"][:, :, 1:18].bool()).all()
    torch.testing.assert_close(prompts.loss, z["dist"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_attend_to_prompts_and_nothing_else_changes(kind):
    """The definition with all weights written out."""
    model = add_prompts(vit(), kind, **SMALL[kind]).eval()
    block, x = model.blocks[0], torch.randn(2, 17, 24).double()
    prompts, allowed = block.prompts(x)
    tokens = torch.cat([x, prompts.expand(2, -1, -1)], 1)
    q, k, v = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    weights = (q[:, :, :17] @ k.mT * 8**-0.5).softmax(-1)
    if allowed is not None:
        weights = weights * torch.cat([torch.ones(2, 17, 17).bool(), allowed], -1)[:, None]
        assert (weights.sum(-1) < 1).all(), "forbidden prompts keep their share"
        assert allowed[:, 0].sum(-1).eq(2).all() and not allowed[:, 0, 4:].any()
        assert allowed[:, 1:].sum(-1).eq(2).all() and not allowed[:, 1:, :4].any()
    expected = block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block.attend(x), expected)


def test_without_their_weight_prompts_change_nothing(monkeypatch):
    plain, images = vit().eval(), torch.randn(2, 3, 32, 32).double()
    model = add_prompts(copy.deepcopy(plain), "vpt", length=3).eval()
    assert not torch.allclose(model(images), plain(images))
    expected, attend = plain(images), F.scaled_dot_product_attention

    def without(q, k, v):
        hidden = torch.arange(k.shape[2]) >= k.shape[2] - 3
        return attend(q, k, v, attn_mask=torch.zeros(k.shape[2]).double().masked_fill(hidden, -torch.inf)[None])

    monkeypatch.setattr(F, "scaled_dot_product_attention", without)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_load_copies_work_and_prompts_learn(kind):
    plain = vit()
    model = add_prompts(copy.deepcopy(plain), kind, **SMALL[kind])
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(".prompts." in key for key in missing.missing_keys)
    images = torch.randn(2, 3, 32, 32).double()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(images), model.eval()(images))
    model.train()(images).square().sum().backward()
    for prompts in prompts_of(model):
        assert all(p.grad is not None for n, p in prompts.named_parameters() if "keys" not in n)
    loss = matching_loss(model.train()) if kind != "tcpa" else None
    assert loss in (0.0, None)
    model(images)
    if kind == "tcpa":
        matching_loss(model).backward()
        assert all(p.keys_cls.grad is not None and p.keys_image.grad is not None for p in prompts_of(model))


def test_choices_are_random_at_the_start():
    prompts = MatchedPrompts(8, pool_cls=6, pool_image=6, topk_cls=2, topk_image=2).double()
    x = torch.randn(1, 5, 8).double()
    prompts.random = True
    assert not torch.equal(prompts(x)[1], prompts(x)[1])
    assert torch.equal(prompts.eval()(x)[1], prompts(x)[1])


@pytest.mark.parametrize(
    ("model", "kind", "options", "message"),
    [
        (vit, "deep", {}, "kind='deep'"),
        (vit, "vpt", {"length": 0}, "length=0"),
        (vit, "tcpa", {"topk_image": 19}, "topk_image=19"),
        (lambda: vit(attn_drop_rate=0.1), "vpt", {}, "attn_drop=0.1"),
        (lambda: vit(class_token=False, global_pool="avg"), "tcpa", {}, "0 prefix tokens"),
        (lambda: timm.create_model("test_resnet"), "vpt", {}, "has no block"),
        (lambda: add_prompts(vit(), "vpt"), "vpt", {}, "blocks of PromptedBlock"),
    ],
)
def test_wrong_arguments(model, kind, options, message):
    with pytest.raises(ValueError, match=message):
        add_prompts(model(), kind, **options)
    with pytest.raises(ValueError, match="do not go with prompts"):
        add_prompts(vit(), "vpt").blocks[0](torch.zeros(1, 17, 24).double(), is_causal=True)
