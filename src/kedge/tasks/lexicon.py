"""The words of the prose task.

Nouns, adjectives and degrees start with a consonant sound, so that ``a`` is right before all of them.
A word has one polarity wherever it stands.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Polarity = Literal["positive", "negative", "neutral"]
POLARITIES: tuple[Polarity, ...] = ("positive", "negative", "neutral")


class Topic(NamedTuple):
    """The nouns of a topic: who acts, what there is, and where it happens; (singular, plural) each."""

    agents: list[tuple[str, str]]
    things: list[tuple[str, str]]
    places: list[str]


def _pairs(text: str) -> list[tuple[str, str]]:
    """Read ``bird/birds child/children`` (singular first) or, for verbs, ``sings/sing``."""
    return [(first, second) for first, second in (pair.split("/") for pair in text.split())]


def _words(text: str) -> list[str]:
    return text.split()


TOPICS: dict[str, Topic] = {
    "garden": Topic(
        _pairs("gardener/gardeners bird/birds neighbour/neighbours"),
        _pairs("flower/flowers tree/trees rose/roses"),
        ["hedge", "pond"],
    ),
    "sea": Topic(
        _pairs("sailor/sailors fisher/fishers captain/captains"),
        _pairs("boat/boats wave/waves shell/shells"),
        ["harbour", "beach"],
    ),
    "kitchen": Topic(
        _pairs("cook/cooks baker/bakers guest/guests"),
        _pairs("cake/cakes pan/pans spoon/spoons"),
        ["stove", "pantry"],
    ),
    "school": Topic(
        _pairs("teacher/teachers pupil/pupils reader/readers"),
        _pairs("book/books pencil/pencils lesson/lessons"),
        ["classroom", "library"],
    ),
    "market": Topic(
        _pairs("trader/traders buyer/buyers seller/sellers"),
        _pairs("coin/coins basket/baskets lamp/lamps"),
        ["square", "fountain"],
    ),
    "forest": Topic(
        _pairs("hunter/hunters fox/foxes wolf/wolves"),
        _pairs("branch/branches mushroom/mushrooms stream/streams"),
        ["clearing", "valley"],
    ),
    "farm": Topic(
        _pairs("farmer/farmers horse/horses shepherd/shepherds"),
        _pairs("field/fields barn/barns plough/ploughs"),
        ["meadow", "stable"],
    ),
    "music": Topic(
        _pairs("singer/singers drummer/drummers dancer/dancers"),
        _pairs("song/songs drum/drums flute/flutes"),
        ["stage", "hall"],
    ),
}

GENERAL_AGENTS = _pairs("child/children woman/women man/men friend/friends")

ADJECTIVES: dict[Polarity, list[str]] = {
    "positive": _words("happy cheerful lovely kind gentle joyful merry sweet friendly beautiful"),
    "negative": _words("sad gloomy bitter cruel lonely weary broken dirty terrible nasty"),
    "neutral": _words("big small tall young quiet green round new long plain"),
}

ADVERBS: dict[Polarity, list[str]] = {
    "positive": _words("happily cheerfully gladly warmly gently joyfully sweetly"),
    "negative": _words("sadly gloomily bitterly coldly badly wearily cruelly"),
    "neutral": _words("slowly quickly quietly often again today"),
}

INTRANSITIVES: dict[Polarity, list[tuple[str, str]]] = {
    "positive": _pairs("smiles/smile laughs/laugh sings/sing dances/dance cheers/cheer"),
    "negative": _pairs("weeps/weep cries/cry suffers/suffer complains/complain trembles/tremble"),
    "neutral": _pairs("waits/wait walks/walk works/work sleeps/sleep rests/rest"),
}

TRANSITIVES: dict[Polarity, list[tuple[str, str]]] = {
    "positive": _pairs("loves/love praises/praise helps/help thanks/thank admires/admire"),
    "negative": _pairs("hates/hate blames/blame hurts/hurt fears/fear scorns/scorn"),
    "neutral": _pairs("sees/see finds/find follows/follow watches/watch knows/know"),
}

THING_VERBS: dict[Polarity, list[tuple[str, str]]] = {
    "positive": _pairs("shines/shine glows/glow gleams/gleam sparkles/sparkle"),
    "negative": _pairs("rots/rot breaks/break fades/fade crumbles/crumble"),
    "neutral": _pairs("stays/stay moves/move falls/fall changes/change"),
}

COPULAS = _pairs("is/are seems/seem looks/look becomes/become")
DEGREES = _words("very so quite really truly")
SINGULAR_DETERMINERS = _words("a every this that one")
PLURAL_DETERMINERS = _words("many some these those two three")
PREPOSITIONS = _words("in near behind beside")
OPENERS = _words("when whenever if although")
LINKS = _words("because while until but")
GRAMMAR_WORDS = _words("the who which and , .")
PROMPT_WORDS = ["topic", ":"]


def polarities() -> dict[str, Polarity]:
    """Return the polarity of every adjective, adverb and verb that is a choice between polarities."""
    found: dict[str, Polarity] = {}
    for polarity in POLARITIES:
        found |= dict.fromkeys(ADJECTIVES[polarity] + ADVERBS[polarity], polarity)
        for verbs in (INTRANSITIVES, TRANSITIVES, THING_VERBS):
            found |= {form: polarity for pair in verbs[polarity] for form in pair}
    return found


def vocabulary() -> list[str]:
    """Return every word of the task once, in a fixed order."""
    words = [*PROMPT_WORDS, *TOPICS, *GRAMMAR_WORDS, *SINGULAR_DETERMINERS, *PLURAL_DETERMINERS]
    words += [*DEGREES, *PREPOSITIONS, *OPENERS, *LINKS]
    words += [form for pair in COPULAS for form in pair]
    words += polarities()
    words += [form for pair in GENERAL_AGENTS for form in pair]
    for topic in TOPICS.values():
        words += [form for pair in topic.agents + topic.things for form in pair] + topic.places
    return list(dict.fromkeys(words))
