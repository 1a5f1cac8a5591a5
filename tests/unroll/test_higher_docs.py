"""The code of docs/from_higher.md runs, block by block, in one namespace."""

import re

from tests.conftest import REPO

PAGE = REPO / "docs" / "from_higher.md"


def test_the_page_on_higher_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict[str, object] = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {i + 1}", "exec"), namespace)
