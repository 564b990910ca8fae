"""A tokenizer of words of given pieces, for alignments of prompts."""

PIECES = {"tiger": "ti ger", "leopard": "leo par d", "riding": "ri ding", "robot": "ro bot", "grass": "gra ss"}
PIECES = {word: pieces.split() for word, pieces in PIECES.items()}
VOCABULARY = [
    *("<s>", "</s>", "photo", "a", "of", "cat", "dog", "ti", "ger", "leo", "par", "d", "ri", "ding", "on", "bike"),
    *("silver", "ro", "bot", "the", "gra", "ss", "red"),
]


class StubTokenizer:
    """Splits at blanks, then into pieces."""

    def encode(self, text):
        pieces = [piece for word in text.split(" ") for piece in PIECES.get(word, [word])]
        return [0, *map(VOCABULARY.index, pieces), 1]

    def decode(self, ids):
        return VOCABULARY[ids[0]]
