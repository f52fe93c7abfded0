"""Word lists of general English captions, for rules that change a caption by one word.

In a list, `|` parts groups. Words of one group may name the same thing (`cat`, `kitten`), so they are never exchanged
for one another; a word may stand in several groups (`bike`). The first word of a group is the one that is written.
A multi-word entry is joined with `_`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """What the lists know of a word."""

    kind: str
    groups: frozenset[str]  # the first words of its groups


_NOUNS = {
    "people": "man guy gentleman boy | woman lady girl",
    "animals": "cat kitten kitty | dog puppy | horse pony | cow calf bull | sheep lamb | goat | elephant | giraffe | "
    "zebra | bear polar_bear | bird duck goose pigeon seagull | monkey | lion | tiger | rabbit | pig",
    "vehicles": "car taxi van | bus | truck | train | airplane plane jet | boat ship | bicycle bike | "
    "motorcycle motorbike bike scooter | tractor | skateboard",
    "furniture": "table desk | chair stool | couch sofa | bed | bench | shelf bookshelf",
    "fixtures": "sink | toilet | bathtub tub | refrigerator fridge | oven stove | microwave | lamp | mirror | clock",
    "electronics": "laptop computer | keyboard | phone cell_phone cellphone | television tv monitor screen | camera",
    "tableware": "plate | bowl | cup mug | bottle | fork | knife | spoon",
    "containers": "box | basket | bag purse backpack | bucket | suitcase | vase",
    "food": "pizza | sandwich burger hamburger | hot_dog | cake cupcake | donut doughnut | apple | banana | orange | "
    "carrot | cookie",
    "clothes": "hat cap helmet | shirt t-shirt | jacket coat | dress | tie | scarf",
    "toys": "frisbee | ball | kite | surfboard | snowboard | tennis_racket racket | baseball_bat | umbrella",
    "street": "stop_sign | fire_hydrant | traffic_light | parking_meter",
    "rooms": "kitchen | bathroom | bedroom | living_room",
    "plants": "tree | flower | bush",
    "shapes": "circle disc | square box | triangle | star | cross plus_sign",
    # Known as nouns, but too wide or too loose to be exchanged for another.
    "": "person | child | kid | baby | adult | toddler | player | surfer | skier | rider | animal | street | road | "
    "window | door | building | house | teddy_bear | bridge | fence | sign | wall | toothbrush | book | blanket | wave",
}
_ATTRIBUTES = {
    # Known, but never exchanged: the first list that has a word gives its kind.
    "": "short | old | new | older | cute | pretty | beautiful | nice | fluffy | furry | fresh | colorful | snowy | "
    "grassy | sandy | busy | bright | dark | light | male | female | adult | wild | square | round | flat | modern | "
    "vintage | cloudy | shiny | fancy | lone | single | different | happy | various | other",
    "color": "red scarlet crimson maroon | orange amber | yellow golden gold blonde | "
    "green emerald olive teal turquoise | blue azure navy teal turquoise | purple violet lavender | pink | black | "
    "white | brown tan beige | gray grey silver",
    "size": "small little tiny | large big huge giant",
    "length": "long | short",
    "height": "tall | short",
    "material": "wooden wood | metal steel metallic | plastic | glass | leather | stone brick",
    "pattern": "striped | plaid checkered | spotted | floral",
    "state": "wet | dry",
    "fill": "empty | full",
    "order": "clean neat | dirty messy",
    "opening": "open | closed",
    "age": "young | elderly",
}

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")  # of 2, 3, ...
COUNTERS = {*NUMBERS, *"23456789", "one", "1", "exactly"}
DETERMINERS = set(
    "a an the this that these those some his her its their my your our each every another no any all both several many "
    "few".split()
)
GENDERED = set("he she him her his hers himself herself".split())
POSSESSIVES = {"his", "her", "its", "their", "my", "your", "our"}

# Relation -> its opposite, several words being one token. Those below it need a look at what stands beside.
FLIPS = {
    **{
        form.format(a): form.format(b)
        for form in ("{} of", "to the {} of", "on the {} of", "on the {} side of", "on the {}", "to the {}")
        for a, b in (("left", "right"), ("right", "left"))
    },
    "above": "below", "below": "above", "beneath": "above", "higher than": "lower than", "lower than": "higher than",
    "underneath": "on top of", "on top of": "underneath", "in front of": "behind", "behind": "in front of",
    "next to": "far from", "beside": "far from", "close to": "far from", "far from": "close to",
    "towards": "away from", "toward": "away from", "away from": "towards",
}  # fmt: skip
BARE_SIDES = {"on the left", "on the right", "to the left", "to the right"}  # of nothing that is named
BEFORE_A_THING = {  # flipped only before a determiner: "over the hill", not "all over", "turned over"
    "over": "under", "under": "over", "inside": "outside", "outside": "inside", "into": "out of", "out of": "into",
    "near": "far from",
}  # fmt: skip
BY_KIND = {("on", "furniture"): "under", ("in", "containers"): "outside", ("in", "vehicles"): "outside"}
UP_AND_DOWN = {"up": "down", "down": "up"}  # after a verb of motion
MOTION = tuple("walk runn rid driv climb ski skat snowboard slid fly mov head go".split())

# "a on b" is not "b on a". With "and", "with", "beside" it is.
ONE_WAY = set(
    "on onto in into inside under over above below beneath underneath behind atop chasing eating riding rides holding "
    "holds carrying carries wearing wears pulling pushing feeding watching throwing catching using drinking biting "
    "rides licking".split()
) | {relation for relation in FLIPS if relation not in ("next to", "beside", "close to", "far from")}  # fmt: skip
_BESIDE_ONE_WAY = set(
    "is are was were being sitting sits sit standing stands stand lying laying lays lies placed parked resting rests "
    "sleeping sleeps walking walks running runs jumping jumps flying flies perched hanging hangs looking looks down up "
    "out back".split()
)
CONNECTING = ONE_WAY | _BESIDE_ONE_WAY

# Words that end a noun phrase.
_VERBS = (
    "sit stand lie lay walk run ride hold look stare wear eat play jump hang wait skateboard drive talk "
    "swim sleep feed pose drink smile fly carry cook pull push throw catch hit swing graze travel lean "
    "rest prepare reach show contain appear seem perform compete enjoy attempt try get take make go come "
    "wash"
)
_THIRD = "has does goes flies carries tries watches touches catches reaches pushes washes crosses lies dries"
BOUNDARIES = (
    set(
        "of on in at by with without to from for and or but nor as than into onto out off up down over under "
        "near beside inside outside between among amongst along across through around against behind above "
        "below beneath underneath toward towards about after before during while when where who which that "
        "whose what there here it they he she him them himself herself itself themselves i you we is are was "
        "were be been being am has have had having do does did can could will would should may might not very "
        "too also together just only so then both atop upon via per like if because until since within it's "
        "away back apart next far close".split()
    )
    | {verb + "s" for verb in _VERBS.split()}
    | set(_THIRD.split())
    | set("sit stand lie walk run hold wear eat sat stood lay rode held wore ate ran left made seen shown set".split())
    | set(FLIPS)
    | set(BEFORE_A_THING)
)
ING_NAMES = set("living dining swimming parking cutting frying wedding ceiling king evening morning railing".split())

_IRREGULAR = {
    "man": "men", "woman": "women", "gentleman": "gentlemen", "child": "children", "person": "people",
    "sheep": "sheep", "goose": "geese", "calf": "calves", "knife": "knives", "shelf": "shelves",
    "bookshelf": "bookshelves", "scarf": "scarves",
}  # fmt: skip


def plural(noun: str) -> str:
    """`box` -> `boxes`, `woman` -> `women`."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def article(word: str) -> str:
    """`a` or `an`, by the sound of the next word."""
    sounds_like_a_vowel = word[:1] in "aeiou8" and not word.startswith(("one", "uni", "use", "eu"))
    return "an" if sounds_like_a_vowel or word.startswith(("hour", "honest", "11", "18")) else "a"


def _entries(lists: dict[str, str]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for kind, text in lists.items():
        for group in text.split("|"):
            words = [word.replace("_", " ") for word in group.split()]
            for word in words:
                known = entries.get(word, Entry(kind, frozenset()))
                entries[word] = Entry(known.kind, known.groups | {words[0]})
    return entries


def _firsts(lists: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {k: tuple(g.split()[0].replace("_", " ") for g in text.split("|")) for k, text in lists.items() if k}


NOUNS, ATTRIBUTES = _entries(_NOUNS), _entries(_ATTRIBUTES)
NOUN_CHOICES, ATTRIBUTE_CHOICES = _firsts(_NOUNS), _firsts(_ATTRIBUTES)
PLURALS = {plural(noun): noun for noun in NOUNS}
PHRASES = sorted(  # several words that are one token, longest first
    {word for word in (*FLIPS, *BEFORE_A_THING, *NOUNS, *PLURALS) if " " in word}, key=len, reverse=True
)
