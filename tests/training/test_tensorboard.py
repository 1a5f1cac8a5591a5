"""What a real TensorBoard server shows of a sweep, through its HTTP interface."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.test_cli import SHORT
from tests.conftest import Metarun

Get = Callable[..., Any]


@pytest.fixture
def board(metarun: Metarun, tmp_path: Path) -> Iterator[Get]:
    """Ask TensorBoard about a sweep over two inner optimizers: `get("data/runs", run=…)`."""
    metarun("train", "-m", *SHORT, "inner_opt=sgd,adam", "hydra.sweep.dir=sweep")
    log = tmp_path / "tensorboard.log"
    with open(log, "w") as file:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tensorboard.main", "--logdir",
             str(tmp_path / "sweep"), "--host", "127.0.0.1", "--port", "0"],
            stdout=file, stderr=file,
        )  # fmt: skip
    try:
        address = wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())).group()

        def get(path: str, data: Any = None, **query: str) -> Any:
            body = None if data is None else json.dumps(data).encode()
            url = f"{address}{path}?{urllib.parse.urlencode(query)}"
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(url, data=body, headers=headers)
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)

        wait_for(lambda: all_are_loaded(get("data/plugin/scalars/tags")))
        yield get
    finally:
        server.terminate()
        server.wait(timeout=30)


def all_are_loaded(tags: dict[str, dict[str, Any]]) -> bool:
    return len(tags) == 2 and all("test/loss_by_inner_step" in found for found in tags.values())


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """The first true value of a condition.

    Raises:
        TimeoutError: there was none in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise TimeoutError


def test_a_sweep_in_tensorboard(board: Get, tmp_path: Path) -> None:
    runs = {path.parent.name: path.parent for path in (tmp_path / "sweep").glob("*/config.yaml")}
    assert set(board("data/runs")) == {f"{name}/tb" for name in runs}
    for name, folder in runs.items():
        result = json.loads((folder / "result.json").read_text())["test"]
        points = board(
            "data/plugin/scalars/scalars", run=f"{name}/tb", tag="test/mse_by_inner_step"
        )
        assert [step for _, step, _ in points] == [0, 1, 2, 3]
        values = [value for _, _, value in points]
        assert values == pytest.approx(result["mse_per_inner_step"], rel=1e-6)

    layout = board("data/plugin/custom_scalars/layout")
    charts = {(c["title"], chart["title"]): chart["multiline"]["tag"]
              for c in layout["category"] for chart in c["chart"]}  # fmt: skip
    one_run = f"{next(iter(runs))}/tb"
    together = {
        tag
        for pattern in charts["meta-training", "mse"]
        for tag in board("data/plugin/custom_scalars/scalars", run=one_run, tag=pattern)[
            "tag_to_events"
        ]
    }
    assert together == {"train/mse", "val/mse", "test/mse"}

    question = {"experimentName": "", "includeMetrics": True}
    experiment = board("data/plugin/hparams/experiment", question)
    infos = {info["name"]: info for info in experiment["hparamInfos"]}
    settings = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in runs.values()]
    assert {"inner_opt.momentum", "inner_opt.beta1"} <= set(infos), "of all runs, not of the first"
    assert [n for n, info in infos.items() if info.get("differs")] == ["inner_opt.name"]
    assert not {"data.root", "data.download", "plugins", "trainer.wandb"} & set(infos)
    metrics = {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert {"test/mse", "val/best_mse"} <= metrics
    question = {
        "experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS"],
        "colParams": [{"hparam": "inner_opt.name"},
                      {"metric": {"tag": "test/mse", "group": ""}}],
        "startIndex": 0, "sliceSize": 10,
    }  # fmt: skip
    groups = board("data/plugin/hparams/session_groups", question)["sessionGroups"]
    shown = {
        group["hparams"]["inner_opt.name"]: next(
            m["value"] for m in group["metricValues"] if m["name"]["tag"] == "test/mse"
        )
        for group in groups
    }
    stored = {
        config["inner_opt"]["name"]: json.loads((folder / "result.json").read_text())["test"]["mse"]
        for config, folder in zip(settings, runs.values(), strict=True)
    }
    assert shown == pytest.approx(stored, rel=1e-6)
