"""A second reader of the world's language: words -> meaning, from the grammar alone, without the package's tables."""

import re
from collections import namedtuple

SHAPES = {
    "circle": "circle", "disc": "circle", "square": "square", "box": "square", "triangle": "triangle",
    "cross": "cross", "plus sign": "cross",
}  # fmt: skip
PLURALS = {
    "circles": "circle", "discs": "circle", "squares": "square", "boxes": "square", "triangles": "triangle",
    "crosses": "cross", "plus signs": "cross",
}  # fmt: skip
COLORS = {
    "red": "red", "scarlet": "red", "orange": "orange", "amber": "orange", "yellow": "yellow", "golden": "yellow",
    "green": "green", "emerald": "green", "blue": "blue", "azure": "blue", "purple": "purple", "violet": "purple",
    "black": "black", "white": "white",
}  # fmt: skip
SIZES = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"}
SIDES = {
    "left of": "left", "to the left of": "left", "on the left of": "left", "on the left side of": "left",
    "right of": "right", "to the right of": "right", "on the right of": "right", "on the right side of": "right",
    "above": "above", "over": "above", "higher than": "above",
    "below": "below", "under": "below", "beneath": "below", "lower than": "below",
}  # fmt: skip
ENDS = {
    "on the left": "left", "furthest to the left": "left", "on the right": "right", "furthest to the right": "right",
    "at the top": "above", "highest up": "above", "at the bottom": "below", "lowest down": "below",
}  # fmt: skip
COUNTS = {
    f"{word}{name}": number
    for number, names in enumerate((("no",), ("one", "1"), ("two", "2"), ("three", "3"), ("four", "4")))
    for name in names
    for word in ("", "exactly ")
    if not (word and (name.isdigit() or number == 0))
}
PREFIX = re.compile(
    r"^(?:(?:a (?:photo|picture|drawing|view)|an image) of |a scene with )?(?=an? |no |one|two|three|four|exactly|\d)"
)

Thing = namedtuple("Thing", "shape color size")


def _any(words) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


_SIDE, _COUNT = _any(SIDES), _any(COUNTS)
_THING = re.compile(rf"(?:({_any(SIZES)}) )?(?:({_any(COLORS)}) )?({_any({**PLURALS, **SHAPES})})")
_NAMED = rf"(?:{_any(SIZES)} )?(?:{_any(COLORS)} )?{_any({**PLURALS, **SHAPES})}"


def thing(words: str) -> Thing:
    """`tiny golden discs` -> (circle, yellow, small)."""
    match = _THING.fullmatch(words)
    assert match, words
    size, color, shape = match.groups()
    return Thing({**SHAPES, **PLURALS}[shape], COLORS.get(color), SIZES.get(size))


def claims(text: str) -> list[tuple]:
    """What a caption claims: ("exists", thing), ("count", thing, n), ("relation", thing, side, thing)."""
    body = PREFIX.sub("", text)
    if match := re.fullmatch(rf"({_COUNT}) ({_NAMED})", body):
        number, words = match.groups()
        plural = words.endswith("s") and words.split()[-1] != "cross"
        assert plural == (COUNTS[number] != 1), text
        return [("count", thing(words), COUNTS[number])]
    if match := re.fullmatch(rf"(an? {_NAMED}) ({_SIDE}) (an? {_NAMED})", body):
        first, side, second = match.groups()
        a, b = _indefinite(first), _indefinite(second)
        return [("exists", a), ("exists", b), ("relation", a, SIDES[side], b)]
    parts = re.split(r", | and also | together with | and | with ", body)
    return [("exists", _indefinite(part)) for part in parts]


def _indefinite(words: str) -> Thing:
    article, rest = words.split(" ", 1)
    assert article == ("an" if rest[0] in "aeo" else "a"), words  # no word of the world starts with i or u
    return thing(rest)


def referents(text: str, things) -> list:
    """The scene objects that an expression names, by trying every one."""
    if match := re.fullmatch(rf"(?:all the|the ({_COUNT})) ({_NAMED})", text):
        number, words = match.groups()
        hits = [t for t in things if _is(t, thing(words))]
        assert words not in SHAPES and (number is None or COUNTS[number] == len(hits)), text
        return hits
    if match := re.fullmatch(rf"the ({_NAMED})", text):
        return [t for t in things if _is(t, thing(match[1]))]
    if match := re.fullmatch(rf"the ({_NAMED}) ({_any(ENDS)})", text):
        hits = [t for t in things if _is(t, thing(match[1]))]
        places = sorted((_place(t, ENDS[match[2]]), id(t)) for t in hits)
        assert len(hits) > 1 and places[1][0] - places[0][0] > 0.079, text  # a clear winner
        return [t for t in hits if id(t) == places[0][1]]
    match = re.fullmatch(rf"the ({_NAMED}) ({_SIDE}) the ({_NAMED})", text)
    assert match, text
    wanted, landmark, side = thing(match[1]), thing(match[3]), SIDES[match[2]]
    pairs = [(t, u) for t in things for u in things if t is not u and _is(t, wanted) and _is(u, landmark)]
    return [t for t, u in pairs if side_of(t.box, u.box) == side]


def _is(thing, wanted: Thing) -> bool:
    return all(want in (None, have) for want, have in zip(wanted, (thing.shape, thing.color, thing.size), strict=True))


def _place(thing, end: str) -> float:
    x0, y0, x1, y1 = thing.box
    return {"left": x0 + x1, "right": -x0 - x1, "above": y0 + y1, "below": -y0 - y1}[end] / 2


def side_of(a, b) -> str | None:
    """The relation of two boxes: the longer way decides, and must exceed a tenth of both extents."""
    ways = []
    for axis, (low, high) in enumerate((("left", "right"), ("above", "below"))):
        way = (a[axis] + a[axis + 2]) / 2 - (b[axis] + b[axis + 2]) / 2
        extents = a[axis + 2] - a[axis] + b[axis + 2] - b[axis]
        ways.append((abs(way), abs(way) > 0.1 * extents, high if way > 0 else low))
    (dx, _, _), (dy, _, _) = ways
    if dx == dy:
        return None
    _, clear, name = max(ways)
    return name if clear else None


HELD_OUT_PAIRS = {
    "orange square", "yellow triangle", "green cross", "blue circle", "purple square", "white triangle",
}  # fmt: skip
HELD_OUT_SIDES = {
    "triangle left square", "square left cross", "cross above circle",
    "square right triangle", "cross right square", "circle below cross",
}  # fmt: skip


def held_out_words(text: str) -> bool:
    """Whether a caption or an expression names a held-out composition."""
    named = [thing(words) for words in re.findall(rf"\b{_NAMED}\b", text)]
    sides = re.findall(rf" ({_SIDE}) (?:an?|the) (?={_NAMED})", text)
    return any(f"{t.color} {t.shape}" in HELD_OUT_PAIRS for t in named) or any(
        f"{named[0].shape} {SIDES[side]} {named[1].shape}" in HELD_OUT_SIDES for side in sides
    )


def held_out_scene(things) -> bool:
    """Whether any thing, or any two, of a scene make a held-out composition."""
    return any(f"{t.color} {t.shape}" in HELD_OUT_PAIRS for t in things) or any(
        f"{t.shape} {side_of(t.box, u.box)} {u.shape}" in HELD_OUT_SIDES for t in things for u in things if t is not u
    )
