"""On an accelerator that is simulated, no meta-step waits for it, and no tensor is elsewhere.

What is simulated, and what cannot be, is in docs/performance.md. Each exception has its reason, and
fails the test when it is one no more.
"""

import json
import re
import subprocess
import sys
from typing import Any, NamedTuple

from metarun.config.catalogue import GROUPS, schemas
from tests.conftest import REPO
from tests.simulated.cases import EXCLUDED, cases
from tests.simulated.faults import FAULTS, OF_THE_OUTER_LOOP

PARTS = {  # of a case: where what is let pass in it may be
    "first": ("first",),
    "later": ("first", "later", "evaluation"),
    "evaluation": ("first", "evaluation"),
}


class Known(NamedTuple):
    """A wait that is let pass.

    Attributes:
        part: of `PARTS`. The first meta-step and the first evaluation are "first".
        place: file and function of metarun, and the operation.
        cases: a pattern of the cases that it is in.
        why: the reason.
    """

    part: str
    place: str
    cases: str
    why: str


KNOWN = (
    Known(
        "first", "training/loop.py:tell_unlearned aten._to_copy", "",
        "which layers have no gradient is told once",
    ),
    Known(
        "first", "unroll/gradients/recompute.py:alike aten.equal", "",
        "a loss that is recomputed is tried out twice, once for each network",
    ),
    Known(
        "first", "unroll/gradients/mixed_check.py:_equal aten.equal", "engine.gradient=mixed",
        "forward and reverse mode are compared once",
    ),
    Known(
        "first", "unroll/gradients/mixed_check.py:_equal aten._local_scalar_dense",
        "engine.gradient=mixed", "the same",
    ),
    Known(
        "later", "unroll/recording/comparison.py:_same_bits aten._local_scalar_dense",
        "recordings compared", "at calls that become more seldom; all other cases leave it out",
    ),
    Known(
        "later", "training/loop.py:meta_step aten._local_scalar_dense", "trainer.nonfinite=skip",
        "whether a step counts must be known before the next one",
    ),
    Known(
        "later", "unroll/optim/newton.py:_lowest_eigenvalue aten._linalg_eigh",
        "inner_opt=(newton|partition)", "torch checks that eigenvalues were found",
    ),
    Known(
        "later", "? aten._linalg_check_errors", "inner_opt=(newton|partition)",
        "torch's derivative of solve_ex checks; it is computed in a thread without metarun's calls",
    ),
    Known(
        "later", "components/algo/minibatches.py:minibatches aten.copy_",
        "algo=(baseline|baseline_pp|reptile) ", "numbers of examples, once for all inner steps",
    ),
    Known(
        "evaluation", "training/evaluation.py:evaluate aten._to_copy", "",
        "the scores of all tasks, at the end",
    ),
)  # fmt: skip

Outcomes = dict[str, dict[str, Any]]


def outcomes(module: str, environment: dict[str, str]) -> Outcomes:
    """What `tests.simulated.<module>` prints, in a process of its own: torch knows the device."""
    command = [sys.executable, "-W", "ignore", "-m", f"tests.simulated.{module}"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {name: outcome for line in lines for name, outcome in line.items()}


def waits(outcome: dict[str, Any], part: str) -> set[str]:
    """Where the host waits; mismatches keep their name, and so are no exception anywhere."""
    return {event.removeprefix("wait ").removesuffix(".default") for event in outcome[part]}


def is_of(known: Known, case: str) -> bool:
    """Whether its pattern is of this case."""
    return re.match(known.cases, case) is not None


def unknown(case: str, outcome: dict[str, Any]) -> list[str]:
    """What no exception allows."""
    return [
        f"{part}: {place}"
        for part in PARTS
        for place in sorted(waits(outcome, part))
        if not any(
            known.place == place and part in PARTS[known.part] and is_of(known, case)
            for known in KNOWN
        )
    ]


def test_no_meta_step_and_no_evaluation_waits_but_where_it_must(
    environment: dict[str, str],
) -> None:
    found = outcomes("catalogue", environment)
    assert set(found) == set(cases())
    assert {case: one["error"] for case, one in found.items() if one["error"]} == {}
    assert {case: more for case, one in found.items() if (more := unknown(case, one))} == {}
    for known in KNOWN:
        own = [one for case, one in found.items() if is_of(known, case)]
        parts = set(PARTS[known.part]) - ({"first"} if known.part != "first" else set())
        assert any(known.place in waits(one, part) for one in own for part in parts), known


def test_what_is_done_wrong_on_purpose_is_seen(environment: dict[str, str]) -> None:
    found = outcomes("faults", environment)
    seen = {case: [one["error"] or "", *unknown(case, one)] for case, one in found.items()}
    for clean in ("none", "none recorded", "a buffer", "as on a CPU"):
        assert seen.pop(clean) == [""]
    assert len(seen) == 2 * len(FAULTS) - 2 + len(OF_THE_OUTER_LOOP)
    for case, what in seen.items():
        if "tensor of the CPU" in case:
            assert what[0].startswith("Mismatch"), case
        elif what[0]:  # what looks at values cannot be recorded, and is refused by name
            assert case.endswith("recorded") and "cannot be recorded" in what[0], (case, what)
        else:
            part = "first" if case.endswith("recorded") else "later"  # a replay may be without it
            assert any(place.startswith(part) for place in what[1:]), case


def test_each_component_is_tried() -> None:
    names = {case.partition(" ")[0] for case in cases()}
    assert {f"{group}={name}" for group in GROUPS for name in schemas(group)} <= names
    assert not any(case.startswith(tuple(EXCLUDED)) for case in cases())
