from __future__ import annotations

import random

from kedge.tasks import lexicon, prose
from kedge.tasks.slips import SLIP_SHARE, slip, slips

TEXTS = [row["completion"].split() for row in prose.examples("train", 2000, seed=3)]


def test_a_slip_changes_one_place() -> None:
    draw = random.Random(0)
    lengths = set()
    for words in TEXTS:
        changed = slip(words, draw)
        assert changed
        assert set(changed) <= set(lexicon.vocabulary())
        cut = changed == words[: len(changed)]
        first = next(
            (i for i, (a, b) in enumerate(zip(words, changed, strict=False)) if a != b), len(changed)
        )
        shift = len(changed) - len(words)
        assert cut or words[first + 2 :] == changed[first + 2 + shift :]
        lengths.add(max(-2, shift))
    assert lengths == {-2, -1, 0, 1}


def test_a_text_of_one_word() -> None:
    draw = random.Random(1)
    assert all(slip(["happy"], draw) for _ in range(200))


def test_the_share_of_texts_without_a_slip() -> None:
    draw = random.Random(2)
    same = sum(slips(words, draw) == words for words in TEXTS) / len(TEXTS)
    assert 1 - SLIP_SHARE - 0.05 < same < 1 - SLIP_SHARE + 0.07  # some slips swap equal words


def test_most_slips_are_mistakes_and_some_are_not() -> None:
    draw = random.Random(3)
    prompts = ["topic : sea"] * len(TEXTS)
    right = prose.grammatical(prompts, [" ".join(slip(words, draw)) for words in TEXTS])
    assert 0.03 < sum(right) / len(right) < 0.3
