"""AgentSD on a tiny random UNet: what is computed, where, when, and that nothing is left behind."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from foveal.zoo.agent_sd import (
    AGENT_SD_RECIPE,
    AgentSDProcessor,
    agent_sd_schedule,
    apply_agent_sd,
    remove_agent_sd,
    switch_agent_sd,
)
from foveal.zoo.token_merging import Matching, random_destinations

HEADS = 2


@pytest.fixture
def unet():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=HEADS,  # diffusers' name for the number of heads
    )
    return model.double().eval()


@torch.no_grad()
def predict(unet, height=16, width=16, batch=2):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, height, width, generator=generator, dtype=torch.float64)
    text = torch.randn(batch, 7, 12, generator=generator, dtype=torch.float64)
    return unet(sample, 10, encoder_hidden_states=text).sample


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def changed(unet):
    return [name for name, x in unet.attn_processors.items() if isinstance(x, AgentSDProcessor)]


def test_merging_nothing_changes_nothing(unet):
    plain = predict(unet)
    apply_agent_sd(unet, ratio=0.0, agent_ratio=0.0)
    assert torch.equal(predict(unet), plain)


def test_removal_restores_the_unet(unet):
    plain, processors = predict(unet), dict(unet.attn_processors)
    apply_agent_sd(unet, generator=seeded())
    apply_agent_sd(unet, generator=seeded(), max_downsample=2)  # replaces, does not stack
    assert len(changed(unet)) == 7 and len(unet._forward_pre_hooks) == 1
    assert not torch.allclose(predict(unet), plain)
    remove_agent_sd(unet)
    assert unet.attn_processors == processors and not unet._forward_pre_hooks
    assert torch.equal(predict(unet), plain)
    remove_agent_sd(unet)


def test_only_self_attention_is_changed(unet):
    apply_agent_sd(unet)
    assert changed(unet) and all(".attn1." in name for name in changed(unet))


def test_destinations_are_one_of_every_whole_cell():
    grid = random_destinations((7, 9), (2, 4), seeded()).view(7, 9)
    assert not grid[6:].any() and not grid[:, 8:].any()
    assert (grid[:6, :8].view(3, 2, 2, 4).sum((1, 3)) == 1).all()
    places = torch.stack([random_destinations((2, 4), (2, 4), seeded(s)) for s in range(200)])
    assert (places.sum(0) > 5).all(), "every token of a cell is drawn"


def merge_matrix(tokens, destination, count):
    """`[left, N]` of one batch entry, pair by pair: rows average, and its support says who gets whose output."""
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    sources, destinations = (~destination).nonzero().flatten().tolist(), destination.nonzero().flatten().tolist()
    pairs = []
    for s in sources:
        similarity, d = max(((unit[s] @ unit[d]).item(), -i) for i, d in enumerate(destinations))
        pairs.append((-similarity, s, destinations[-d]))
    pairs.sort()
    groups = [[s] for _, s, _ in pairs[count:]]
    groups += [[d, *(s for _, s, to in pairs[:count] if to == d)] for d in destinations]
    matrix = torch.zeros(len(groups), len(tokens), dtype=torch.float64)
    for row, group in zip(matrix, groups, strict=True):
        row[group] = 1 / len(group)
    return matrix


@pytest.mark.parametrize("count", [0, 5, 18, 1000])
def test_merging_averages_the_most_similar_pairs(count):
    torch.manual_seed(2)
    tokens, x = torch.randn(2, 2, 24, 5, dtype=torch.float64)
    destination = random_destinations((4, 6), (2, 2), seeded())
    merging = Matching(tokens, destination).merging(count)
    matrix = torch.stack([merge_matrix(t, destination, min(count, 18)) for t in tokens])
    assert len(merging) == matrix.shape[1] == 24 - min(count, 18)
    torch.testing.assert_close(merging.merge(x), matrix @ x)
    merged = merging.merge(x)
    torch.testing.assert_close(merging.unmerge(merged), (matrix.mT > 0).double() @ merged)


def direct(attn, x, ratio, agent_ratio, k_scale2, k_shortcut, cell):
    """The formula, entry by entry and head by head."""
    destination = random_destinations((16, 16), cell, seeded())
    outs = []
    for tokens in x:
        spread = merge_matrix(tokens, destination, int(256 * ratio))
        most = int((~destination).sum())
        merged = spread @ tokens
        agents = merge_matrix(tokens, destination, min(int(256 * agent_ratio), most)) @ tokens
        q, k, v, a = attn.to_q(merged), attn.to_k(merged), attn.to_v(merged), attn.to_q(agents)
        heads = []
        for q, k, v, a in zip(*(y.chunk(HEADS, dim=-1) for y in (q, k, v, a)), strict=True):  # noqa: B020
            d = q.shape[-1]
            if 2 * len(agents) < len(merged):
                gathered = (a @ k.mT * d**-0.5).softmax(-1) @ v
                heads.append((q @ a.mT * d ** (-0.5 * k_scale2)).softmax(-1) @ gathered + k_shortcut * v)
            else:
                heads.append((q @ k.mT * d**-0.5).softmax(-1) @ v)
        outs.append((spread.mT > 0).double() @ attn.to_out[0](torch.cat(heads, dim=-1)))
    return torch.stack(outs)


@pytest.mark.parametrize(
    ("ratio", "agent_ratio", "cell"),
    [(0.4, 0.95, (4, 4)), (0.5, 0.8, (2, 2)), (0.0, 0.8, (2, 4)), (0.4, 0.5, (2, 2))],
    ids=["recipe", "defaults", "agents only", "merging only"],
)
@torch.no_grad()
def test_the_formula(unet, ratio, agent_ratio, cell):
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    options = dict(ratio=ratio, agent_ratio=agent_ratio, k_scale2=0.4, k_shortcut=0.2)
    apply_agent_sd(unet, **options, sy=cell[0], sx=cell[1], generator=seeded())
    calls = []
    attn.register_forward_hook(lambda module, args, out: calls.append((args[0], out)))
    predict(unet)
    ((x, out),) = calls
    assert x.shape == (2, 256, 16)
    torch.testing.assert_close(out, direct(attn, x, **options, cell=cell), rtol=1e-10, atol=1e-10)


def test_max_downsample_says_how_deep(unet):
    names = [n for n, m in unet.named_modules() if n.endswith("attn1")]
    seen = {}
    for name in names:
        unet.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args, out)}))

    def changed_layers(**options):
        """Layers whose output is not that of their own processor for the same input."""
        apply_agent_sd(unet, generator=seeded(), **options)
        predict(unet)
        calls = dict(seen)
        remove_agent_sd(unet)
        with torch.no_grad():
            return {n for n, (args, out) in calls.items() if not torch.equal(unet.get_submodule(n)(*args), out)}

    top = {n for n in names if "down_blocks.0" in n or "up_blocks.1" in n}
    assert changed_layers() == top and top and top != set(names)
    assert changed_layers(max_downsample=2) == set(names)


@pytest.mark.parametrize("shape", [(15, 13), (16, 2), (1, 9), (3, 3)])
def test_odd_latents(unet, shape):
    apply_agent_sd(unet, max_downsample=8, sx=4, sy=2, generator=seeded())
    out = predict(unet, *shape)
    assert out.shape == (2, 4, *shape) and out.isfinite().all()


def test_latents_smaller_than_a_cell_are_left_alone(unet):
    plain = predict(unet, 3, 3)
    apply_agent_sd(unet, sx=4, sy=4)
    assert torch.equal(predict(unet, 3, 3), plain)


def test_generator_makes_it_reproducible(unet):
    outs = []
    for seed in (0, 0, 1):
        apply_agent_sd(unet, generator=seeded(seed))
        outs.append(predict(unet))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_batch_entries_do_not_mix(unet):
    outs = []
    for batch in (1, 2):
        apply_agent_sd(unet, generator=seeded())
        generator = torch.Generator().manual_seed(1)
        sample = torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64)[:batch]
        text = torch.randn(2, 7, 12, generator=generator, dtype=torch.float64)[:batch]
        with torch.no_grad():
            outs.append(unet(sample, 10, encoder_hidden_states=text).sample)
    torch.testing.assert_close(outs[0][0], outs[1][0])


def test_training_is_possible(unet):
    apply_agent_sd(unet, generator=seeded())
    sample = torch.randn(1, 4, 16, 16, dtype=torch.float64)
    unet(sample, 10, encoder_hidden_states=torch.randn(1, 7, 12, dtype=torch.float64)).sample.sum().backward()
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    assert all(x.weight.grad.abs().sum() > 0 for x in (attn.to_q, attn.to_k, attn.to_v))


class Pipeline(DiffusionPipeline):
    """The denoising loop of diffusers' pipelines, calling back as they do."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def num_timesteps(self):
        return len(self.scheduler.timesteps)

    @torch.no_grad()
    def __call__(self, latents, text, steps, callback_on_step_end):
        self.scheduler.set_timesteps(steps)
        for i, t in enumerate(self.scheduler.timesteps):
            latents = self.scheduler.step(self.unet(latents, t, encoder_hidden_states=text).sample, t, latents)[0]
            latents = callback_on_step_end(self, i, t, {"latents": latents}).pop("latents", latents)
        return latents


def test_settings_that_leave_too_many_agents_are_said(unet, caplog):
    apply_agent_sd(unet, **AGENT_SD_RECIPE[0])
    assert "tokens are only merged" not in caplog.text
    apply_agent_sd(unet)
    assert "tokens are only merged" in caplog.text


def test_schedule_switches_in_a_pipeline(unet):
    pipe = Pipeline(unet, DDIMScheduler())
    apply_agent_sd(pipe, **AGENT_SD_RECIPE[0])
    state = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor.state
    steps = []
    unet.register_forward_hook(lambda *_: steps.append((state.settings.sx, state.settings.agent_ratio)))
    latents, text = torch.randn(1, 4, 16, 16, dtype=torch.float64), torch.randn(1, 7, 12, dtype=torch.float64)
    schedule = agent_sd_schedule({0: AGENT_SD_RECIPE[0], 2: AGENT_SD_RECIPE[20]})
    for _ in range(2):  # the second image starts as the first
        steps.clear()
        pipe(latents, text, 5, schedule)
        assert steps == [(4, 0.95)] * 2 + [(2, 0.5)] * 3


WRONG = {
    "ratio": ({"ratio": 1.5}, "ratio=1.5"),
    "agent_ratio": ({"agent_ratio": -0.1}, "agent_ratio=-0.1"),
    "sx": ({"sx": 0}, "sx=0"),
    "sy": ({"sy": 1.5}, "sy=1.5"),
    "max_downsample": ({"max_downsample": 3}, r"max_downsample=3 must be one of \(1, 2, 4, 8\)"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_setting_is_refused(unet, options, message):
    with pytest.raises(ValueError, match=message):
        apply_agent_sd(unet, **options)
    assert not changed(unet)
    apply_agent_sd(unet)
    with pytest.raises(ValueError, match=message):
        switch_agent_sd(unet, **options)


def test_what_has_no_self_attention_is_refused():
    plain = UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    with pytest.raises(ValueError, match="UNet2DModel has no BasicTransformerBlock"):
        apply_agent_sd(plain)
    with pytest.raises(TypeError, match="got str"):
        apply_agent_sd("unet")


def test_switching_needs_something_to_switch(unet):
    with pytest.raises(ValueError, match="call apply_agent_sd first"):
        switch_agent_sd(unet, ratio=0.3)
    apply_agent_sd(unet)
    with pytest.raises(TypeError, match="cells"):
        switch_agent_sd(unet, cells=3)
    with pytest.raises(ValueError, match="must have settings for step 0"):
        agent_sd_schedule({20: {}})
