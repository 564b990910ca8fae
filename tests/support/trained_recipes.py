"""Recipes of trained models at work in the attention of toys: a part that is fresh, and one that was trained."""

from dataclasses import replace

import torch
from foveal.zoo.control import Edit, Where, edits, recipes
from generators import flux, scrambled, sd_unet, wan


def flat(x):
    return x.flatten(2)


def dreamvideo2(call, out, grid, on):
    """Attention to the first tokens, as those of a reference, inside of a mask."""
    read = replace(call, key=call.key[:, :4], value=call.value[:, :4]).dense()
    mask = torch.zeros(call.query.shape[1])
    return recipes.dreamvideo2(flat(out), flat(read), mask + on, outside=0.0)


def scaleweaver(call, out, grid, on):
    """Attention to other tokens through a projection that starts at zero."""
    query, *own = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    condition = [x[:, :, ::2] for x in own]
    return recipes.scaleweaver(query, tuple(own), tuple(condition), lambda x: on * x)


def fulldit(call, out, grid, on):
    """Tokens of a condition behind those of the video, or none."""
    parts = []
    for x in (call.query, call.key, call.value):
        sequence, spans = recipes.fulldit(flat(x), {"depth": flat(x[:, :2]) if on else None})
        parts.append(sequence.unflatten(-1, x.shape[2:]))
    first, end = spans["video"]
    query, key, value = parts
    return replace(call, query=query, key=key, value=value).dense()[:, first:end]


def ultra3d(call, out, grid, on):
    """One part, or two."""
    labels = torch.arange(call.query.shape[1]) % (1 + on)
    return edits.attend_by_groups(call, recipes.ultra3d(labels), type(call).dense)


def foveated(call, out, grid, on):
    """All of the image is fine, or its left half; text comes before it. Positions are in queries and keys already."""
    text = call.query.shape[1] - grid[0] * grid[1]
    fovea = torch.ones(grid, dtype=torch.bool)
    fovea[:, grid[1] // 2 :] = not on
    packing, attend = recipes.foveated(fovea)
    packed = (
        torch.cat([x[:, :text], packing.pack(flat(x[:, text:])).unflatten(-1, x.shape[2:])], 1)
        for x in (call.query, call.key, call.value)
    )
    found = flat(attend(*packed, packing, lambda x, places: x))
    return torch.cat([found[:, :text], packing.unpack(found[:, text:])], 1)


def trajectory_attention(call, out, grid, on):
    """A branch over frames along paths that stand still; the frames of a UNet are its batch."""
    height, width = grid[-2:]
    hidden = flat(call.query)
    hidden = hidden.unflatten(1, (grid[0], -1)) if len(grid) == 3 else hidden[None]
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1) + 0.5
    paths = places.expand(hidden.shape[1], -1, -1)
    options = {"grid": (height, width), "size": (height, width), "heads": call.query.shape[2]}
    branch = recipes.trajectory_attention(
        hidden, paths, torch.ones(paths.shape[:2], dtype=torch.bool), projections=(torch.nn.Identity(),) * 4, **options
    )
    return flat(out) + on * branch.reshape(flat(out).shape)


LAYERS = {
    f.__name__: f for f in (dreamvideo2, scaleweaver, fulldit, ultra3d, foveated, trajectory_attention)
}  # (operation, its output, its grid, whether trained) → output
LOSSES = {"attencraft": recipes.attencraft, "break_a_scene": recipes.break_a_scene}  # of maps of words, and masks


class InLayers(Edit):
    """Puts the output of a function in the place of an attention's."""

    guidance = "both"

    def __init__(self, function, where, on):
        self.function, self.where, self.on = function, where, on

    def out(self, call, plan, out):
        grid = plan.layout.grid_of(plan.site)
        return self.function(call, out, grid, self.on).reshape(out.shape)


def toy_of(name, kind):
    """A model in double precision whose parts all matter, its arguments, and where the function is at work."""
    torch.manual_seed(0)
    if kind == "unet":
        (model, inputs), where = sd_unet(2, size=(8, 12)), Where(kinds=("self",), scales=(1,))
    elif name == "foveated":
        (model, inputs), where = flux(2, grid=(6, 8)), Where(kinds=("joint",))
    else:
        (model, inputs), where = wan(2), Where(kinds=("self",))
    return scrambled(model).double().eval(), inputs, where
