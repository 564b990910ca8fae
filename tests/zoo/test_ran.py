"""Residual attention networks beyond what every model of the zoo is asked."""

import foveal.zoo  # noqa: F401
import pytest
import timm
import torch
from foveal.zoo.backbones.ran import AttentionModule, SoftMask, Unit
from torch import nn


@pytest.mark.parametrize(("name", "count"), [("ran_56", 31_810_728), ("ran_92", 52_466_344)])
def test_parameters_are_those_of_the_authors_network_definitions(name, count):
    """31.811 and 52.466 million, counted layer by layer."""
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == count


def test_masks_of_a_stage_reach_the_same_map():
    model = timm.create_model("ran_92", device="meta")
    levels = [[len(m.down) for m in stage.modules() if isinstance(m, SoftMask)] for stage in model._stages]
    assert levels == [[3], [2, 2], [1, 1, 1], []]


def test_without_weights_a_mask_is_one_half():
    module = AttentionModule(8, levels=2).double().eval()
    nn.init.zeros_(module.mask.out[-1].weight)
    x = torch.randn(1, 8, 9, 6, dtype=torch.float64)
    first = module.first(x)
    torch.testing.assert_close(module(x), module.last(1.5 * module.trunk(first)))


def test_masks_see_the_whole_map_and_units_a_neighborhood():
    torch.manual_seed(0)
    for layer, whole in ((SoftMask(16, levels=3), True), (Unit(16, 16), False)):
        x = torch.randn(1, 16, 24, 24, requires_grad=True)
        layer.eval()(x)[0, :, 0, 0].sum().backward()
        reached = x.grad.abs().sum(1)[0] > 0
        assert bool(reached[12:, 12:].any()) is whole
