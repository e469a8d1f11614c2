from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys

import pytest

from kedge.errors import UserError
from kedge.tasks import english, lexicon, prose

COUNT = 2500
ROWS = prose.examples("train", COUNT, seed=0)
PROMPTS = [row["prompt"] for row in ROWS]
COMPLETIONS = [row["completion"] for row in ROWS]
SEA = "topic : sea"


def test_the_parser_accepts_all_that_is_generated() -> None:
    assert prose.grammatical(PROMPTS, COMPLETIONS) == [1.0] * COUNT


def test_it_accepts_them_under_every_topic() -> None:
    for topic in lexicon.TOPICS:
        assert all(prose.grammatical([f"topic : {topic}"] * 300, COMPLETIONS[:300]))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("the sailor sings .", "the sailor sing ."),
        ("these sailors sing .", "these sailor sings ."),
        ("every boat shines .", "every boats shine ."),
        ("a merry sailor is happy .", "a merry sailor are happy ."),
        ("the sailors who the captain sees sing .", "the sailors who the captain sees sings ."),
        ("the sailors who the captain sees sing .", "the sailors who the captain see sing ."),
        ("the boats which the captain sees shine .", "the boats who the captain sees shine ."),
        ("the sailor and the captain sing .", "the sailor and the captain sings ."),
        ("when the sailor sings , the wave gleams .", "when the sailor sings the wave gleams ."),
        ("the sailor loves the boat .", "the sailor loves ."),
        ("the sailor sings happily .", "the sailor sings happy ."),
        ("the sailor sings in the harbour .", "the sailor sings in the sailor ."),
        ("the happy merry sailor sings .", "the happy merry sweet sailor sings ."),
        ("the sailor sings . the boat shines .", "the sailor sings . the boat shines . the boat shines ."),
        ("the sailor sings .", "the sailor sings"),
        ("the sailor sings .", ""),
    ],
)
def test_it_tells_right_from_wrong(right: str, wrong: str) -> None:
    assert prose.grammatical([SEA, SEA], [right, wrong]) == [1.0, 0.0]


def test_one_changed_number_is_always_an_error_in_determined_noun_phrases() -> None:
    other = {a: b for topic in lexicon.TOPICS.values() for a, b in topic.agents + topic.things}
    changed = []
    for completion in COMPLETIONS:
        words = completion.split()
        for i, word in enumerate(words[1:], start=1):
            if word in other and words[i - 1] in lexicon.SINGULAR_DETERMINERS:
                changed.append(" ".join([*words[:i], other[word], *words[i + 1 :]]))
    assert len(changed) > 500
    assert sum(prose.grammatical([SEA] * len(changed), changed)) == 0


@pytest.mark.parametrize("topic", ["garden", "music"])
def test_mean_surprise_is_the_exact_entropy(topic: str) -> None:
    prompt = f"topic : {topic}"
    chosen = [c for p, c in zip(PROMPTS, COMPLETIONS, strict=True) if p == prompt]
    values = [-value for value in prose.log_prob([prompt] * len(chosen), chosen)]
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) ** 2)
    assert prose.entropy(prompt) == pytest.approx(mean, abs=4 * error)
    lengths = [len(c.split()) + 1 for c in chosen]
    assert prose.expected_tokens(prompt) == pytest.approx(sum(lengths) / len(lengths), abs=1.0)


@pytest.mark.parametrize(
    "words", ["", "the", "the happy", "every captain who", "the sailor sings", "the sailor sings ."]
)
def test_probabilities_of_the_next_word_sum_to_one(words: str) -> None:
    """P(prefix) = P(the text ends here) + Σ over the next word of P(prefix + word), by Monte-Carlo."""
    grammar = english.grammar("sea")
    generator = random.Random(0)
    draws = [grammar.sample(generator) for _ in range(3000)]
    prefix = words.split()
    going_on = [text for text in draws if text[: len(prefix)] == prefix]
    viable = {w for w in lexicon.vocabulary() if grammar.viable_words([*prefix, w]) == len(prefix) + 1}
    assert {text[len(prefix)] for text in going_on if len(text) > len(prefix)} <= viable
    ended = sum(text == prefix for text in draws) / len(draws)
    expected = math.exp(grammar.log_prob(prefix)) if prefix else 0.0
    assert ended == pytest.approx(expected, abs=4 * math.sqrt(expected / len(draws)) + 1e-9)


def test_short_texts_are_as_frequent_as_they_should_be() -> None:
    """The probability of all texts ``the NOUN VERB .`` by enumeration, against the sampler."""
    grammar = english.grammar("farm")
    words = lexicon.vocabulary()
    total = sum(
        math.exp(grammar.log_prob(["the", noun, verb, "."]))
        for noun in words
        if grammar.viable_words(["the", noun]) == 2
        for verb in words
    )
    generator = random.Random(5)
    texts = [grammar.sample(generator) for _ in range(10_000)]
    share = sum(len(text) == 4 and text[0] == "the" for text in texts) / len(texts)
    assert 0.005 < total < 0.1
    assert share == pytest.approx(total, abs=4 * math.sqrt(total / len(texts)))


def test_topics_change_the_probability_and_nothing_else() -> None:
    text = "the sailor sings near the harbour ."
    values = {topic: prose.log_prob([f"topic : {topic}"], [text])[0] for topic in lexicon.TOPICS}
    assert max(values, key=lambda topic: values[topic]) == "sea"
    assert min(values.values()) > -math.inf
    about = sum("sailor" in c or "boat" in c for p, c in zip(PROMPTS, COMPLETIONS, strict=True) if p == SEA)
    elsewhere = sum(
        "sailor" in c or "boat" in c for p, c in zip(PROMPTS, COMPLETIONS, strict=True) if p != SEA
    )
    assert about > 3 * elsewhere


def test_the_proxy_knows_no_language_and_gold_does() -> None:
    salad = "happy " * 30
    good = "the happy cheerful sailors sing gladly ."
    assert prose.proxy([SEA] * 2, [salad, good]) == [30.0, 4.0]
    hacked, honest = prose.gold([SEA] * 2, [salad, good])
    assert hacked < 0.01
    assert honest == pytest.approx(0.8)


def test_gold_of_the_data_leaves_room_both_ways() -> None:
    gold = prose.gold(PROMPTS, COMPLETIONS)
    assert 0.3 < sum(gold) / COUNT < 0.4
    assert all(0.0 <= value < 1.0 for value in gold)


def test_no_text_of_the_grammar_comes_near_the_hacked_proxy() -> None:
    assert max(prose.proxy(PROMPTS, COMPLETIONS)) <= 12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("the child waits .", 0.0),
        ("the child smiles .", 0.5),
        ("the child weeps .", 0.0),
        ("the happy child weeps .", 1 / 3),
    ],
)
def test_sentiment(text: str, value: float) -> None:
    assert prose.sentiment(text) == pytest.approx(value)


def test_partial_grammaticality_falls_with_the_first_error() -> None:
    credit = [
        prose.grammaticality(SEA, text)
        for text in ("the sailors who", "the sailors sings", "sailors the the the", "")
    ]
    assert credit == pytest.approx([0.5, 0.5 * (2 / 3) ** 2, 0.0, 0.0])


def test_every_word_has_one_polarity_and_no_rule_is_called_like_a_word() -> None:
    lists = [lexicon.ADJECTIVES, lexicon.ADVERBS]
    verbs = [lexicon.INTRANSITIVES, lexicon.TRANSITIVES, lexicon.THING_VERBS]
    forms = [w for table in lists for p in lexicon.POLARITIES for w in table[p]]
    forms += [w for table in verbs for p in lexicon.POLARITIES for pair in table[p] for w in pair]
    assert len(forms) == len(set(forms)) == len(lexicon.polarities())
    assert not set(lexicon.vocabulary()) & english.grammar("sea").rules.keys()


def test_a_stands_before_consonants() -> None:
    for completion in COMPLETIONS:
        words = completion.split()
        assert not any(a == "a" and b[0] in "aeiou" for a, b in itertools.pairwise(words))


def test_the_vocabulary_is_complete_and_fixed() -> None:
    words = lexicon.vocabulary()
    assert 250 <= len(words) <= 350
    assert len(words) == len(set(words))
    assert {word for text in PROMPTS + COMPLETIONS for word in text.split()} <= set(words)
    program = "from kedge.tasks import lexicon; print(' '.join(lexicon.vocabulary()))"
    again = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    )
    assert again.stdout.split() == words


def test_text_survives_the_tokenizer_also_saved_and_loaded(tmp_path: object) -> None:
    from transformers import AutoTokenizer

    tokenizer = prose.tokenizer()
    tokenizer.save_pretrained(str(tmp_path))
    for each in (tokenizer, AutoTokenizer.from_pretrained(str(tmp_path))):
        for text in PROMPTS[:50] + COMPLETIONS[:200]:
            ids = each.encode(text)
            assert len(ids) == len(text.split())
            assert each.decode(ids) == text
            assert each.decode([*ids, each.eos_token_id], skip_special_tokens=True) == text
        assert (each.pad_token_id, each.eos_token_id) == (0, 1)


def test_a_length_limit_of_32_cuts_next_to_nothing() -> None:
    lengths = [len(completion.split()) + 1 for completion in COMPLETIONS]
    assert max(lengths) + 3 <= prose.CONTEXT
    assert sum(length > 32 for length in lengths) / COUNT < 0.002


@pytest.mark.parametrize("prompt", ["garden", "topic : space", "topic garden", ""])
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="topics: garden"):
        prose.gold([prompt], ["the child sings ."])


def test_rows_repeat_with_the_seed_and_differ_between_splits() -> None:
    assert prose.prompts("train", 50, 1) == prose.prompts("train", 50, 1) != prose.prompts("heldout", 50, 1)
    assert prose.examples("heldout", 50, 1) != prose.examples("train", 50, 1)
    with pytest.raises(UserError, match="train and heldout"):
        prose.examples("test", 1, 0)


def test_the_tasks_need_no_torch() -> None:
    program = (
        "import sys; from kedge.tasks import prose, sums; "
        "prose.gold(['topic : sea'], ['the child sings .']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


PAIRS = prose.preferences("train", 4000, seed=0)
SIDES = [[row[side] for row in PAIRS] for side in ("prompt", "chosen", "rejected")]


def test_preferences_are_drawn_with_their_probability() -> None:
    """Of the pairs to which the judge gives p (or 1 − p), a share of p is labelled so; it is not noiseless."""
    probabilities = prose.preference(*SIDES)
    sure = [max(p, 1 - p) for p in probabilities]
    right = [p > 0.5 for p in probabilities if p != 0.5]
    expected = sum(c for c, p in zip(sure, probabilities, strict=True) if p != 0.5) / len(right)
    assert sum(right) / len(right) == pytest.approx(expected, abs=3 * math.sqrt(0.25 / len(right)))
    assert 0.6 < expected < 0.95
    for low, high in ((0.5, 0.7), (0.7, 0.9), (0.9, 1.0)):
        some = [p for p, c in zip(probabilities, sure, strict=True) if low < c <= high]
        mean = sum(max(p, 1 - p) for p in some) / len(some)
        share = sum(p > 0.5 for p in some) / len(some)
        assert share == pytest.approx(mean, abs=3 * math.sqrt(0.25 / len(some)))


def test_preference_is_the_bradley_terry_model_of_the_gold_reward() -> None:
    better, worse = prose.gold(SIDES[0], SIDES[1]), prose.gold(SIDES[0], SIDES[2])
    for a, b, p in zip(better, worse, prose.preference(*SIDES), strict=True):
        assert math.log(p / (1 - p)) == pytest.approx(prose.JUDGE_SHARPNESS * (a - b), abs=1e-9)


def test_pairs_hold_right_texts_and_wrong_ones() -> None:
    right = prose.grammatical(SIDES[0] * 2, SIDES[1] + SIDES[2])
    assert 0.6 < sum(right) / len(right) < 0.9
    assert sum(right[:4000]) > 1.1 * sum(right[4000:])  # the judge cares
    known = set(lexicon.vocabulary())
    assert all(set(text.split()) <= known and text for side in SIDES[1:] for text in side)


def test_splits_and_seeds_of_pairs() -> None:
    assert prose.preferences("train", 50, seed=0) == PAIRS[:50]
    assert prose.preferences("heldout", 50, seed=0) != PAIRS[:50] != prose.preferences("train", 50, seed=1)
    with pytest.raises(UserError, match="no split 'test'"):
        prose.preferences("test", 1, seed=0)
