"""Words of prompts as token numbers, and alignments of the tokens of two prompts.

An alignment is a map of the tokens of a source prompt to those of a target, of Prompt-to-Prompt (arXiv:2208.01626).
`align="words"` aligns word by word; `align="official"` repeats the authors' code, which shifts what follows a swap of
words with unequal numbers of tokens.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..sites.models import models_of

CLIP_TOKENS = 77
T5 = (("tokenizer", 0),)
# tokenizers whose tokens are the text stream of a generator, and the number of the first token of each
TOKENIZERS: dict[str, tuple[tuple[str, int], ...]] = {
    "UNet2DConditionModel": T5,
    "UNetMotionModel": T5,
    "SD3Transformer2DModel": (("tokenizer", 0), ("tokenizer_3", CLIP_TOKENS)),
    "FluxTransformer2DModel": (("tokenizer_2", 0),),
    "QwenImageTransformer2DModel": T5,
    "HiDreamImageTransformer2DModel": (("tokenizer_3", 0), ("tokenizer_4", 128)),
    "CogVideoXTransformer3DModel": T5,
    "WanTransformer3DModel": T5,
    "LTXVideoTransformer3DModel": T5,
    "MochiTransformer3DModel": T5,
    "HunyuanVideoTransformer3DModel": T5,
    "CosmosTransformer3DModel": T5,
    "LatteTransformer3DModel": T5,
    "AllegroTransformer3DModel": T5,
    "VideoDiT": T5,
}


def find_words(pipe_or_model: Any, name: str, word: Any) -> tuple[int, ...]:
    """Token numbers of an entry of `words=` of a Control: (prompt, word), (prompt, word, tokenizer), or numbers.

    Raises:
        ValueError: a prompt that does not hold the word, or a generator whose tokenizers are not known.
        TypeError: something else.
    """
    if isinstance(word, Sequence) and word and all(isinstance(x, int) for x in word):
        return tuple(word)
    if not (isinstance(word, Sequence) and len(word) in (2, 3) and all(isinstance(x, str) for x in word[:2])):
        raise TypeError(f"words[{name!r}]={word!r} must be token numbers, (prompt, word) or (prompt, word, tokenizer)")
    prompt, text = word[:2]
    if len(word) == 3:
        return word_tokens(word[2], prompt, text)
    model = next(iter(models_of(pipe_or_model).values()))
    streams = TOKENIZERS.get(type(model).__name__)
    found = [(getattr(pipe_or_model, attribute, None), offset) for attribute, offset in streams or ()]
    if not found or any(tokenizer is None for tokenizer, _ in found):
        raise ValueError(
            f"words[{name!r}]: the tokenizer of {type(pipe_or_model).__name__} is not known; give (prompt, word, "
            "tokenizer), or the numbers of the tokens"
        )
    before, cropped = _template(pipe_or_model)
    return tuple(
        token - cropped + offset
        for tokenizer, offset in found
        for token in word_tokens(tokenizer, before + prompt, text)
        if token >= cropped
    )


def _template(pipe: Any) -> tuple[str, int]:
    """Text that a pipeline puts before prompts, and the tokens that it crops."""
    template, cropped = (
        getattr(pipe, "prompt_template_encode", None),
        getattr(pipe, "prompt_template_encode_start_idx", 0),
    )
    if template is None:
        constant = getattr(sys.modules.get(type(pipe).__module__), "DEFAULT_PROMPT_TEMPLATE", None)
        if not isinstance(constant, Mapping) or "template" not in constant:
            return "", 0
        template, cropped = constant["template"], constant.get("crop_start") or 0
    return str(template).partition("{}")[0], int(cropped)


def token_places(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Characters of a text that each of its tokens stands for, first and end; equal for tokens without text."""
    if getattr(tokenizer, "is_fast", False):
        return [tuple(place) for place in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
    lower, places, at = text.lower(), [], 0
    for token in tokenizer.encode(text):
        piece = re.sub(r"[#▁Ġ\s]|</w>", "", tokenizer.decode([token])).lower()
        start = at
        while start < len(lower) and lower[start].isspace():
            start += 1
        if piece and lower.startswith(piece, start):
            places.append((start, start + len(piece)))
            at = start + len(piece)
        else:
            places.append((at, at))
    return places


def word_tokens(tokenizer: Any, prompt: str, word: str, length: int | None = None) -> tuple[int, ...]:
    """Numbers of the tokens of a word, or of several, in a prompt; of every place where it stands.

    Args:
        tokenizer: of transformers, or anything with `encode` and `decode`.
        prompt: text.
        word: one or more words of it; case is ignored.
        length: tokens that the generator looks at.

    Raises:
        ValueError: a word that is not in the prompt, that shares a token with its neighbors, or past the length.
    """
    places = token_places(tokenizer, prompt)
    found = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", prompt, re.IGNORECASE)]
    if not word.strip() or not found:
        raise ValueError(f"prompt {prompt!r} has no word {word!r}; its words are {_split(prompt, 'words')}")
    numbers = []
    for first, end in found:
        for number, (start, stop) in enumerate(places):
            text = prompt[start:stop]
            start += len(text) - len(text.lstrip())
            if min(end, stop) <= max(first, start):
                continue
            if start < first or stop > end:
                raise ValueError(f"word {word!r} of prompt {prompt!r} shares the token {text!r} with its neighbors")
            numbers.append(number)
    if not numbers or (length is not None and max(numbers) >= length):
        raise ValueError(f"word {word!r} stands past the {length or len(places)} tokens of prompt {prompt!r}")
    return tuple(numbers)


def _split(prompt: str, align: str) -> list[str]:
    """Words of a prompt: at blanks as the official code, or with punctuation apart."""
    if align not in ("words", "official"):
        raise ValueError(f"align={align!r} must be 'words' or 'official'")
    return prompt.split(" ") if align == "official" else re.findall(r"\w+|[^\w\s]", prompt)


def _tokens_by_word(tokenizer: Any, prompt: str, words: Sequence[str], align: str) -> list[tuple[int, ...]]:
    """Token numbers of each word of a prompt, in order."""
    owned: list[list[int]] = [[] for _ in words]
    if align == "official":  # by the lengths of the pieces alone
        pieces = [tokenizer.decode([token]).strip("#") for token in tokenizer.encode(prompt)][1:-1]
        word, length = 0, 0
        for number, piece in enumerate(pieces, 1):
            owned[word].append(number)
            length += len(piece)
            if length >= len(words[word]):
                word, length = word + 1, 0
        return [tuple(numbers) for numbers in owned]
    starts, at = [], 0
    for word in words:
        at = prompt.index(word, at)
        starts.append((at, at + len(word)))
        at += len(word)
    for number, (first, end) in enumerate(token_places(tokenizer, prompt)):
        for owner, (start, stop) in zip(owned, starts, strict=True):
            if min(end, stop) > max(first, start):
                owner.append(number)
    return [tuple(numbers) for numbers in owned]


def replacement_map(
    tokenizer: Any, source: str, target: str, *, align: str = "words", length: int = CLIP_TOKENS
) -> Tensor:
    """Map of a source prompt's tokens to those of a target whose words are swapped one by one.

    Args:
        tokenizer: of both.
        source, target: prompts with equal numbers of words.
        align: "words" or "official"; see the module.
        length: tokens of the text.

    Returns:
        `[length, length]`, from source to target: the edited map is `source map @ this`.

    Raises:
        ValueError: prompts with different numbers of words.
    """
    words = [_split(prompt, align) for prompt in (source, target)]
    if len(words[0]) != len(words[1]):
        raise ValueError(
            f"replacing words needs as many in both prompts; source={source!r} has {len(words[0])} and "
            f"target={target!r} {len(words[1])}: refine instead"
        )
    old, new = (_tokens_by_word(tokenizer, p, w, align) for p, w in zip((source, target), words, strict=True))
    swaps = [(old[i], new[i]) for i, pair in enumerate(zip(*words, strict=True)) if pair[0] != pair[1]]
    matrix = torch.zeros(length, length)
    i = j = 0
    while i < length and j < length:
        if swaps and swaps[0][0][0] == i:
            gone, come = swaps.pop(0)
            if len(gone) == len(come):
                matrix[list(gone), list(come)] = 1
            else:
                matrix[torch.tensor(gone)[:, None], torch.tensor(come)] = 1 / len(come)
            i, j = i + len(gone), j + len(come)
            continue
        row = j if align == "official" and not swaps else i
        matrix[row, j] = 1
        i, j = i + 1, j + 1
    if align == "words":
        matrix[length - 1, j:] = 1  # padding of the target beyond that of the source
    return matrix


def refinement_map(tokenizer: Any, source: str, target: str, *, length: int = CLIP_TOKENS) -> tuple[Tensor, Tensor]:
    """Global alignment of a target prompt's tokens with those of a source to which words were added.

    Needleman-Wunsch with gap 0, match 1, mismatch -1; ties go left, up, diagonal.

    Returns:
        mapper: int64 `[length]`, source token of each target token, -1 without one.
        alpha: float32 `[length]`, 1 where there is one.

    Raises:
        ValueError: a prompt of more than `length` tokens.
    """
    x, y = tokenizer.encode(source), tokenizer.encode(target)
    if max(len(x), len(y)) > length:
        raise ValueError(f"prompts of {len(x)} and {len(y)} tokens must have at most length={length}")
    score = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    came = [["left"] * (len(y) + 1)] + [["up"] * (len(y) + 1) for _ in x]
    for i, a in enumerate(x, 1):
        for j, b in enumerate(y, 1):
            steps = {
                "left": score[i][j - 1],
                "up": score[i - 1][j],
                "diagonal": score[i - 1][j - 1] + (1 if a == b else -1),
            }
            came[i][j] = max(steps, key=steps.__getitem__)  # the first of equal ones
            score[i][j] = steps[came[i][j]]
    mapper = torch.arange(length)
    i, j = len(x), len(y)
    while j > 0:
        step = came[i][j]
        if step == "up":
            i -= 1
            continue
        j -= 1
        if step == "diagonal":
            i -= 1
        mapper[j] = i if step == "diagonal" else -1
    return mapper, (mapper >= 0).float()


def cross_times(
    tokenizer: Any,
    prompts: Sequence[str],
    steps: int,
    times: float | tuple[float, float] | Mapping[str, Any],
    *,
    align: str = "words",
    length: int = CLIP_TOKENS,
) -> Tensor:
    """Steps in which each token of each target takes the source's map.

    Args:
        tokenizer: of the prompts.
        prompts: source, then targets.
        steps: of the run.
        times: end, or first and end, in fractions of the run; or those by word, with "default_" for the others.
        align: see the module.
        length: tokens of the text.

    Returns:
        0 or 1, `[steps + 1, targets, length]`.

    Raises:
        ValueError: a word that no target has, or a fraction outside of 0..1.
    """
    by_word = dict(times) if isinstance(times, Mapping) else {"default_": times}
    by_word.setdefault("default_", (0.0, 1.0))
    table = torch.zeros(steps + 1, len(prompts) - 1, length)

    def fill(bounds: Any, target: int, tokens: Any) -> None:
        first, end = (0.0, bounds) if isinstance(bounds, float | int) else bounds
        if not 0 <= first <= end <= 1:
            raise ValueError(f"times={bounds!r} must be fractions of the run in 0..1")
        first, end = int(first * len(table)), int(end * len(table))
        table[:, target, tokens] = 0
        table[first:end, target, tokens] = 1

    for target in range(len(prompts) - 1):
        fill(by_word["default_"], target, slice(None))
    for word in (word for word in by_word if word != "default_"):
        found = 0
        for target, prompt in enumerate(prompts[1:]):
            words = _split(prompt, align)
            owned = zip(words, _tokens_by_word(tokenizer, prompt, words, align), strict=True)
            tokens = [token for other, own in owned if other == word for token in own]
            found += len(tokens)
            if tokens:
                fill(by_word[word], target, tokens)
        if not found:
            raise ValueError(f"times names the word {word!r}, which none of {list(prompts[1:])} has")
    return table
