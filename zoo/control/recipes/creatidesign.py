"""CreatiDesign: boxes with texts and a subject image, each bound to its place."""

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


@recipe(
    "CreatiDesign, masks",
    "arXiv:2505.19114, HuiZhang0812/CreatiDesign@5efe047",
    "exact",
    hosts="FLUX with streams of objects and of a subject",
    needs="trained streams (LoRA), boxes, a subject image",
    cost="less than dense: a call for each group of tokens that see the same",
)
def creatidesign(*, objects: bool = True, subject: bool = True) -> dict[tuple[str, str], str]:
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
