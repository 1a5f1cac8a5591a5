"""The deliberate breakages of scripts/mutations fit the code, so that they cannot rot."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.conftest import REPO


@pytest.fixture(scope="module")
def mutate() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "scripts"))
        import mutate

        yield mutate
    sys.modules.pop("mutate")


def test_each_breakage_changes_one_place_and_is_python(mutate: ModuleType) -> None:
    breakages = mutate.load()
    assert len(breakages) > 90
    for breakage in breakages:
        mutate.broken(breakage)


def test_each_breakage_has_a_name_a_reason_and_tests_that_are_there(mutate: ModuleType) -> None:
    breakages = mutate.load()
    names = [breakage.name for breakage in breakages]
    assert len(set(names)) == len(names)
    for breakage in breakages:
        assert breakage.why and breakage.tests, breakage.name
        for test in breakage.tests:
            file, _, function = test.partition("::")
            text = (REPO / file).read_text()
            assert f"def {function.partition('[')[0]}" in text, f"{breakage.name}: {test}"


def test_a_breakage_that_does_not_fit_is_refused(mutate: ModuleType) -> None:
    one = mutate.load()[0]
    for old, new, message in (
        ("no such text", "", "0 times, not once"),
        ("import", "", "times, not once"),
        (one.old, "(", "was never closed"),
        (one.old, f"{one.old} ", "means the same"),
    ):
        with pytest.raises(mutate.Misfit, match=message):
            mutate.broken(one._replace(old=old, new=new))


def test_what_is_caught_counts_and_a_hang_does_not(
    mutate: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    one = mutate.load()[0]
    ends = [mutate.Outcome(one, ended, "", 1.0) for ended in ("caught", "survived", "hangs")]
    shown = mutate.table(ends)
    assert f"{one.topic:12} {3:5} {1:7}" in shown
    assert f"survived: {one.name}" in shown and f"hangs: {one.name}" in shown
    assert one.why in shown
