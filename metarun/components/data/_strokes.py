"""Invented alphabets: characters as programs of pen strokes, and the hands that write them.

A stroke is a row of turns: the angle by which the pen changes direction at each of its steps.
No turn is a straight line, equal turns an arc, one large turn a corner; a hand that bends a
little more or less than another, as people do, is a change of these angles.

The idea of characters as programs that many hands execute is that of Lake, Salakhutdinov and
Tenenbaum 2015, "Human-level concept learning through probabilistic program induction".

Coordinates are (x, y) with y downwards. A character's own unit is half its larger extent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STEPS = 24  # straight pieces of a stroke; enough for a full circle to look round
MOST_STROKES = 4
ALONG = np.linspace(0.0, 1.0, STEPS)
# A hand errs smoothly: its wrong directions are a sum of a few slow waves along the stroke.
WAVES = np.stack([np.cos(k * np.pi * ALONG) for k in range(4)])
WAVE_STRENGTHS = np.array([0.8, 1.0, 0.6, 0.3])


@dataclass(frozen=True)
class Stroke:
    """One movement of the pen, and where it begins relative to an earlier one.

    Attributes:
        turns: radians, (STEPS,); the first is the direction in which the stroke sets off.
        step: length of each step.
        joins: index of the earlier stroke that this one is placed against (the first: 0).
        joins_at: the point of that stroke, 0 to STEPS.
        own_at: the point of this stroke that is put there, 0 to STEPS.
        offset: (2,), how far from there; zero where the strokes touch.
    """

    turns: Floats
    step: float
    joins: int
    joins_at: int
    own_at: int
    offset: Floats


@dataclass(frozen=True)
class Character:
    """A stroke program.

    Attributes:
        strokes: in the order in which they are drawn.
        centre, scale: the shift and the factor that fit the ideal drawing into [-1, 1].
        ideal: that drawing, without any hand's errors, (strokes, STEPS + 1, 2).
    """

    strokes: tuple[Stroke, ...]
    centre: Floats
    scale: float
    ideal: Floats


@dataclass(frozen=True)
class Alphabet:
    """What the characters of one alphabet have in common.

    Attributes:
        shapes: the few stroke shapes it is made of, radians, (shapes, STEPS).
        headings: the directions in which its strokes set off, radians.
        sizes: the extents its strokes have.
        stroke_counts: probability of 1, 2, ... MOST_STROKES strokes.
        relations: probability of each of `RELATIONS`.
        offsets: where a detached stroke lies, (offsets, 2).
        stretch: width and height of its characters, (2,).
        slant: sideways shift for each unit upwards.
    """

    shapes: Floats
    headings: Floats
    sizes: Floats
    stroke_counts: Floats
    relations: Floats
    offsets: Floats
    stretch: Floats
    slant: float


@dataclass(frozen=True)
class Hands:
    """The habits of some people, each array with one entry a person.

    Attributes:
        looseness: typical error of a direction, radians.
        curl: how much more than the ideal the pen turns, as a factor.
        affine: slant, turn and size of the writing, (people, 2, 2).
        shift: where in the frame the person writes, in units of a character, (people, 2).
        pen: half the width of the line, pixels.
    """

    looseness: Floats
    curl: Floats
    affine: Floats
    shift: Floats
    pen: Floats


# Pairs (point of the earlier stroke, point of this one), as shares of their lengths.
RELATIONS: tuple[tuple[float, float] | None, ...] = (
    (1.0, 0.0),  # goes on where the earlier stroke ended
    (0.0, 0.0),  # leaves from the same start
    (0.5, 0.0),  # branches off the middle
    (0.25, 0.0),  # branches off the first half
    (0.75, 0.0),  # branches off the second half
    (0.5, 0.5),  # crosses the middle
    (0.25, 0.5),  # crosses the first half
    (1.0, 0.5),  # closes off the end, like the bar of a T
    None,  # stands beside it
)


def invent_shape(rng: np.random.Generator) -> Floats:
    """The turns of a stroke, radians, (STEPS,), that runs to the right before it bends."""
    turns = np.zeros(STEPS)
    side = rng.choice([-1.0, 1.0])
    half = STEPS // 2
    kind = rng.choice(["line", "arc", "hook", "corner", "wave", "loop", "ring", "zigzag"],
                      p=[0.2, 0.2, 0.17, 0.13, 0.1, 0.08, 0.06, 0.06])  # fmt: skip
    if kind == "line":
        turns[1:] = rng.normal(0.0, 0.15) / STEPS
    elif kind == "arc":
        turns[1:] = side * rng.uniform(1.2, 4.2) / STEPS
    elif kind == "hook":
        start = rng.integers(half, STEPS - 5)
        turns[start:] = side * rng.uniform(1.8, 3.6) / (STEPS - start)
    elif kind == "corner":
        turns[rng.integers(half - 4, half + 6)] = side * rng.uniform(1.2, 2.5)
    elif kind == "wave":
        bend = rng.uniform(2.0, 3.8)
        turns[1:half] = side * bend / half
        turns[half:] = -side * bend / half
        turns[0] = -side * bend / 2
    elif kind == "loop":
        start = rng.integers(STEPS // 4, half)
        turns[start:] = side * rng.uniform(5.2, 7.0) / (STEPS - start)
    elif kind == "ring":
        turns[1:] = side * 2 * np.pi / STEPS
    else:
        bend = rng.uniform(1.6, 2.5)
        turns[STEPS // 3] = side * bend
        turns[2 * STEPS // 3] = -side * bend
    return turns


def invent_alphabet(rng: np.random.Generator) -> Alphabet:
    """The style of an alphabet."""
    headings = rng.permutation(np.arange(8) * np.pi / 4)[: rng.integers(3, 6)]
    angle = rng.uniform(0, 2 * np.pi, 2)
    return Alphabet(
        shapes=np.stack([invent_shape(rng) for _ in range(rng.integers(4, 8))]),
        headings=headings + rng.normal(0.0, 0.12),
        sizes=np.array([1.0, rng.uniform(0.4, 0.8)]),
        stroke_counts=rng.dirichlet([1.5, 7.0, 8.0, 1.5]),
        relations=rng.dirichlet(np.full(len(RELATIONS), 0.7)),
        offsets=rng.uniform(0.35, 0.7, (2, 1)) * np.stack([np.cos(angle), np.sin(angle)], 1),
        stretch=np.array([1.0, rng.uniform(0.75, 1.2)]) * rng.uniform(0.85, 1.0),
        slant=rng.normal(0.0, 0.12),
    )


def invent_character(alphabet: Alphabet, rng: np.random.Generator) -> Character:
    """A character in the style of an alphabet."""
    count = 1 + rng.choice(MOST_STROKES, p=alphabet.stroke_counts)
    strokes: list[Stroke] = []
    for index in range(count):
        turns = alphabet.shapes[rng.integers(len(alphabet.shapes))].copy()
        turns *= rng.choice([-1.0, 1.0], p=[0.3, 0.7])
        turns[0] += rng.choice(alphabet.headings)
        if any(_bends_both_ways(stroke.turns) for stroke in strokes):
            # Two zigzags that cross would now and then make a swastika.
            turns[1:] = np.abs(turns[1:])
        extent = np.ptp(_walk(turns[None])[0], axis=0).max()
        size = alphabet.sizes[0 if index == 0 else rng.integers(len(alphabet.sizes))]
        relation = RELATIONS[rng.choice(len(RELATIONS), p=alphabet.relations)]
        there, here = relation or (0.5, 0.5)
        beside = alphabet.offsets[rng.integers(len(alphabet.offsets))]
        touches = index == 0 or relation is not None
        strokes.append(
            Stroke(
                turns=turns,
                step=float(size / extent),
                joins=int(rng.integers(max(index, 1))),
                joins_at=round(there * STEPS),
                own_at=round(here * STEPS),
                offset=np.zeros(2) if touches else beside,
            )
        )
    ideal = trace(strokes, np.zeros(1), np.ones(1), rng)[0]
    low, high = ideal.min((0, 1)), ideal.max((0, 1))
    centre, scale = (low + high) / 2, float(2 / (high - low).max())
    return Character(tuple(strokes), centre, scale, (ideal - centre) * scale)


def meet_hands(people: int, rng: np.random.Generator) -> Hands:
    """People who write: some neat, some hasty, some with a slant."""
    affine = _affine(
        slant=rng.normal(0.0, 0.14, people),
        turn=rng.normal(0.0, 0.06, people),
        size=np.exp(rng.normal(-0.05, 0.09, (people, 2))),
    )
    return Hands(
        looseness=0.085 * np.exp(rng.normal(0.0, 0.35, people)),
        curl=np.exp(rng.normal(0.0, 0.06, people)),
        affine=affine,
        shift=rng.normal(0.0, 0.05, (people, 2)),
        pen=rng.uniform(0.55, 0.95, people),
    )


def write(
    character: Character, alphabet: Alphabet, hands: Hands, rng: np.random.Generator
) -> Floats:
    """One drawing of a character by each hand, (people, strokes, STEPS + 1, 2)."""
    loose = hands.looseness
    people = len(loose)
    paths = trace(character.strokes, loose, hands.curl, rng)
    paths = (paths - character.centre) * character.scale * alphabet.stretch
    paths[..., 0] -= alphabet.slant * paths[..., 1]
    moment = _affine(
        slant=0.5 * loose * rng.normal(size=people),
        turn=0.5 * loose * rng.normal(size=people),
        size=np.exp(0.5 * loose[:, None] * rng.normal(size=(people, 2))),
    )
    matrix = (hands.affine @ moment)[:, None, None]
    paths = (matrix * paths[..., None, :]).sum(-1)
    shift = hands.shift + 0.6 * loose[:, None] * rng.normal(size=(people, 2))
    return np.asarray(paths + shift[:, None, None])


def trace(
    strokes: Sequence[Stroke], looseness: Floats, curl: Floats, rng: np.random.Generator
) -> Floats:
    """Run a stroke program once for each hand, (people, strokes, STEPS + 1, 2).

    A stroke is placed against the earlier strokes as this hand has drawn them, so that an
    error moves everything that hangs on it, and what touches still touches, or nearly so.
    """
    people = len(looseness)
    paths: list[Floats] = []
    for stroke in strokes:
        turns = np.repeat(stroke.turns[None], people, 0)
        turns[:, 1:] *= curl[:, None]
        errors = looseness[:, None] * WAVE_STRENGTHS * rng.normal(size=(people, len(WAVES)))
        turns += np.diff((errors[:, :, None] * WAVES).sum(1), prepend=0.0)
        size = np.exp(0.9 * looseness * rng.normal(size=people))
        path = _walk(turns) * (stroke.step * size)[:, None, None]
        path -= path[:, stroke.own_at, None]
        path += stroke.offset
        # A detached stroke is harder to place than one that touches.
        aim = 0.25 + 0.5 * bool(stroke.offset.any())
        path += (aim * looseness[:, None] * rng.normal(size=(people, 2)))[:, None]
        if paths:
            path += paths[stroke.joins][:, stroke.joins_at, None]
        paths.append(path)
    return np.stack(paths, axis=1)


def _bends_both_ways(turns: Floats) -> bool:
    return bool(turns[1:].min() < 0 < turns[1:].max())


def _walk(turns: Floats) -> Floats:
    """The points passed in steps of length 1 from (0, 0) on; (n, STEPS) to (n, STEPS + 1, 2)."""
    heading = turns.cumsum(1)
    steps = np.stack([np.cos(heading), np.sin(heading)], axis=-1)
    return np.concatenate([np.zeros((len(turns), 1, 2)), steps.cumsum(1)], axis=1)


def _affine(slant: Floats, turn: Floats, size: Floats) -> Floats:
    """Matrices (people, 2, 2) that stretch by `size` (people, 2), then slant, then turn."""
    cos, sin, zero, one = np.cos(turn), np.sin(turn), 0 * turn, 0 * turn + 1
    rotate = np.stack([cos, -sin, sin, cos], -1).reshape(-1, 2, 2)
    shear = np.stack([one, -slant, zero, one], -1).reshape(-1, 2, 2)
    return np.asarray(rotate @ shear * size[:, None, :])
