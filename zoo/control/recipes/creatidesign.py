"""CreatiDesign: boxes with texts and a subject image, each bound to its place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..edits import Visible
from ..registry import recipe

RULES = {
    ("object", "object"): "own",
    ("object", "image"): "region",
    ("image", "image"): "all",
    ("image", "text"): "all",
    ("image", "object"): "region",
    ("image", "subject"): "region",
    ("text", "text"): "all",
    ("text", "image"): "all",
    ("text", "subject"): "region",
    ("subject", "subject"): "all",
    ("subject", "image"): "region",
}


def rules_of(*, objects: bool = True, subject: bool = True) -> dict[tuple[str, str], str]:
    """Rules for `edits.relate` over the streams object, text, image and subject.

    Args:
        objects: whether objects are bound to their boxes; else they see and are seen by the whole image.
        subject: whether the subject is bound to its mask; else it sees and is seen by image and prompt.
    """
    rules = dict(RULES)
    if not objects:
        rules |= {("object", "image"): "all", ("image", "object"): "all"}
    if not subject:
        rules |= {(name, "subject"): "all" for name in ("image", "text")}
        rules |= {("subject", name): "all" for name in ("image", "text")}
    return rules


@recipe(
    "CreatiDesign, masks",
    "arXiv:2505.19114, HuiZhang0812/CreatiDesign@5efe047",
    "exact",
    hosts="FLUX with a reference stream; any joint or cross-attention for the boxes alone",
    needs="trained streams (LoRA), boxes, a subject image",
    cost="less than dense: a call for each group of tokens that see the same",
    recorded="dit_creatidesign",
)
def creatidesign(boxes: Tensor, words: Sequence[str], *, subject: Tensor | None = None) -> list:
    """Edits of who sees whom; objects are words of the Control, the subject is the reference stream.

    Args:
        boxes: masks of the objects, `[objects, height, width]`.
        words: of the Control, all text tokens of each object.
        subject: mask of the subject, `[height, width]`; the reference sees and is seen by image and prompt when None.
    """
    streams = {"object": "entity", "subject": "reference"}
    rules = rules_of(subject=subject is not None)
    rules = {tuple(streams.get(name, name) for name in pair): rule for pair, rule in rules.items()}
    rules |= {("padding", "padding"): "own"}
    if subject is not None:  # tokens of the reference are in the subject's region
        rules |= {("text", "reference"): "all"}
        boxes = torch.cat([boxes.float(), subject[None].float()])
    return [Visible(rules, boxes, words, reference=None if subject is None else len(boxes) - 1)]
