"""Which of two groups of runs is better: differences on the tasks that both have met.

Runs of the same seed are tested on the same tasks. So a difference is taken task by task, and most
of what makes one task harder than another drops out of it.

    d_si = score of the first on task i of seed s − that of the second
    D_s  = mean of d_si over the tasks that both have done
    D    = mean of D_s over the seeds that both have

With two seeds or more the interval is D ± t·s/√n over the n values D_s, with Student's t. It covers
tasks and seeds alike, since each seed has tasks of its own. With one seed it is over the tasks and
knows nothing of the luck of initial weights. Where one model was trained, its test examples stand
in the place of tasks. They are the same for every seed, so the interval over seeds does not cover
them, and there are no more of them to be had.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from scipy.special import bdtr, stdtr, stdtrit

from metarun.reporting.gather import Figures, Run
from metarun.reporting.groups import HIGHER_IS_BETTER, Board, Group
from metarun.rundir.interval import deviation_within, freedom, half_width95

LEVEL = 0.05
ALL_PAIRS = 6  # groups of which each is compared with each; of more, the first with the others
EQUAL = 1e-9  # a deviation of so little, beside the difference, is of rounding
MOST = 10**6  # seeds or tasks that are worth naming


@dataclass(frozen=True)
class Difference:
    """What two groups differ by.

    Attributes:
        value: D.
        ci95: half-width of its interval.
        unit: "seed", "task" or "example", of which there are `count`.
        p: of a paired t-test of D = 0, two-sided. Where all units differ by the same, that of the
            sign test: there is no spread to test with.
        better, worse: units in which the first group was better, or worse.
        sign_p: of a sign test, two-sided.
        deviation: standard deviation over the units. Where all seeds differ by the same, that
            which their tasks account for: means of few tasks are equal by chance.
        within: variance of D_s that its tasks account for, with several seeds; else 0.
        tasks: of each seed.
    """

    value: float
    ci95: float
    unit: str
    count: int
    p: float
    better: int
    worse: int
    sign_p: float
    deviation: float
    within: float
    tasks: int


@dataclass(frozen=True)
class Comparison:
    """Two groups of a board.

    Attributes:
        difference: None where they cannot be compared, for the `reason`.
        p: the p-value of `difference` after Holm's correction over the comparisons of the board.
        level: that its p must be below: 0.05 over the comparisons that Holm's procedure had left
            when it came to this one, or where it stopped before.
    """

    first: Group
    second: Group
    difference: Difference | None
    reason: str
    p: float
    level: float

    @property
    def decided(self) -> bool:
        """Whether the difference is told from 0 at 5 % after the correction."""
        return self.p < LEVEL


def compare(board: Board) -> list[Comparison]:
    """The comparisons of a board, corrected for their number (Holm 1979).

    Each with each for up to 6 groups; of more, the first by validation with each of the others.
    """
    groups = board.groups
    pairs = list(combinations(groups, 2))
    if len(groups) > ALL_PAIRS:
        pairs = [(groups[0], other) for other in groups[1:]]
    higher = HIGHER_IS_BETTER[board.score]
    found = [difference(first, second, higher) for first, second in pairs]
    tested = sorted((d.p, i) for i, d in enumerate(found) if isinstance(d, Difference))
    corrected = {i: (math.nan, LEVEL) for i in range(len(found))}
    largest, level = 0.0, LEVEL
    for rank, (p, i) in enumerate(tested):
        left = len(tested) - rank
        if largest < LEVEL:  # the procedure goes on
            level = LEVEL / left
        largest = max(largest, min(1.0, left * p))
        corrected[i] = (largest, level)
    return [
        Comparison(
            first, second,
            d if isinstance(d, Difference) else None,
            d if isinstance(d, str) else "",
            *corrected[i],
        )
        for i, ((first, second), d) in enumerate(zip(pairs, found, strict=True))
    ]  # fmt: skip


def difference(first: Group, second: Group, higher_is_better: bool) -> Difference | str:
    """What two groups differ by, or why that cannot be said."""
    by_seed = [
        {run.seed: run.test for run in group.runs if run.test is not None}
        for group in (first, second)
    ]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    if not seeds:
        return "they share no seed, so they have met no task in common"
    for seed in seeds:
        names = {own for by in by_seed if (own := by[seed].task_set) is not None}
        if len(names) > 1:
            return f"the tasks of seed {seed} are not the same: {' and '.join(sorted(names))}"
    pairs = [_by_task(by_seed[0][seed], by_seed[1][seed]) for seed in seeds]
    if not all(pairs):
        return "scores by task are missing"
    if any(math.isnan(d) for found in pairs for d in found):
        return "a task has no score"
    tasks = min(map(len, pairs))
    values = pairs[0] if len(seeds) == 1 else [fmean(found) for found in pairs]
    if len(values) < 2:
        return "one task of one seed has no spread"
    within, each, sources = 0.0, first.figures[0].unit, first.figures[0].sources
    if len(seeds) == 1:
        return of_units(values, each, higher_is_better, within, tasks, sources)
    if tasks > 1 and each == "task":
        within = fmean(deviation_within(found, sources) ** 2 / len(found) for found in pairs)
    return of_units(values, "seed", higher_is_better, within, tasks)


def furthest_apart(found: Comparison) -> tuple[Run, Run, dict[int, float]]:
    """The tasks on which two runs of two groups differ most, each way.

    Args:
        found: of tasks that both have done.

    Returns:
        The runs of the seed with the largest difference on a task, and that of the tasks on which
        they differ most, by the number of the task.
    """
    one, other = ({run.seed: run for run in group.runs} for group in (found.first, found.second))
    apart: dict[int, dict[int, float]] = {}
    for seed in sorted(one.keys() & other.keys()):
        tests = [runs[seed].test for runs in (one, other)]
        apart[seed] = dict(enumerate(_by_task(*(test for test in tests if test is not None))))
    seed = max(apart, key=lambda seed: max(map(abs, apart[seed].values())))
    own = apart[seed]
    ends = {pick(own, key=own.__getitem__) for pick in (max, min)}
    return one[seed], other[seed], {task: own[task] for task in sorted(ends) if own[task]}


def of_units(
    values: Sequence[float],
    unit: str,
    higher_is_better: bool,
    within: float,
    tasks: int,
    sources: int = 1,
) -> Difference:
    """The difference from its value in each seed or task; see `Difference`.

    Args:
        sources: that the values come from in turn.
    """
    value, deviation, count = fmean(values), deviation_within(values, sources), len(values)
    if deviation <= EQUAL * abs(value):
        deviation = math.sqrt(within)
    above, below = sum(v > 0 for v in values), sum(v < 0 for v in values)
    better, worse = (above, below) if higher_is_better else (below, above)
    sign_p = min(1.0, 2 * float(bdtr(min(better, worse), better + worse, 0.5)))
    p = sign_p
    if deviation:
        free = freedom(count, sources)
        p = 2 * float(stdtr(free, -abs(value) / (deviation / math.sqrt(count))))
    ci95 = half_width95(deviation, count, sources)
    return Difference(
        value, ci95, unit, count, p, better, worse, sign_p, deviation, within, tasks
    )  # fmt: skip


def units_to_decide(found: Difference, level: float) -> int | None:
    """How many seeds, or tasks of one seed, would tell this difference from 0.

    The least n with t·s/√n < |D|, if D and s stay as they are; None beyond a million. Where all
    differ by the same, the least n with a sign test below the level, 2·2⁻ⁿ.
    """
    if not found.value:
        return None
    if not found.deviation:
        return _least(lambda n: 2 * 0.5**n < level, 2)
    return _least(lambda n: _t(n, level) * found.deviation / math.sqrt(n) < abs(found.value), 2)


def tasks_to_decide(found: Difference, level: float) -> int | None:
    """How many tasks of each seed would do so with the seeds that are there; None: no number would.

    The variance of D_s is that between seeds, B, and that of its tasks, W/T. More tasks shrink W/T
    alone.
    """
    if found.unit != "seed" or not found.value or not found.within:
        return None
    between = max(0.0, found.deviation**2 - found.within)
    allowed = (abs(found.value) / _t(found.count, level)) ** 2 * found.count
    if allowed <= between:
        return None
    needed = math.floor(found.within * found.tasks / (allowed - between)) + 1
    return needed if needed <= MOST else None


def _by_task(first: Figures, second: Figures) -> list[float]:
    """The differences of the tasks that both have done, which are the first ones of each."""
    return [a - b for a, b in zip(first.by_task, second.by_task, strict=False)]


def _t(count: int, level: float) -> float:
    return float(stdtrit(count - 1, 1 - level / 2))


def _least(enough: Callable[[int], bool], start: int) -> int | None:
    """The least number from `start` on that is enough, where larger ones are as well."""
    high = start
    while not enough(high):
        high *= 2
        if high > MOST:
            return None
    low = max(start, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
