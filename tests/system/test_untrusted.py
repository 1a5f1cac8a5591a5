"""Files that nobody vouches for: refused with a message; nothing runs, nothing is allocated."""

import copy
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from metarun.components.algo.maml import MamlConfig
from metarun.components.backbone.conv4 import Conv4Config
from metarun.components.backbone.mlp import MlpConfig
from metarun.components.data.omniglot import OmniglotConfig, characters, shrink
from metarun.components.data.sinusoid import SinusoidConfig
from metarun.components.inner_opt.sgd import SgdConfig
from metarun.components.outer_opt.adam import OuterAdamConfig
from metarun.config.changes import changed
from metarun.config.run import TrainConfig
from metarun.config.trained import EvalConfig
from metarun.episodes.cache import cached
from metarun.episodes.store import from_equal_classes
from metarun.errors import CheckpointError, ConfigError, DataError, explain
from metarun.rundir import checkpoint
from metarun.rundir import directory as rundir
from metarun.system import archive
from metarun.system.memory import machine_memory
from metarun.training.loop import meta_step
from metarun.training.setup import Setup, build, from_plain, to_plain
from metarun.training.state import fresh, restore, snapshot
from tests.conftest import REPO


def config(**parts: Any) -> TrainConfig:
    chosen: dict[str, Any] = {
        "algo": MamlConfig(),
        "data": SinusoidConfig(),
        "backbone": MlpConfig(hidden=[4]),
        "inner_opt": SgdConfig(),
        "outer_opt": OuterAdamConfig(schedule="cosine"),
    }
    return TrainConfig(device="cpu", **(chosen | parts))


@pytest.fixture(scope="module")
def setup() -> Setup:
    return build(config(), torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(setup: Setup) -> dict[str, Any]:
    """A checkpoint after one meta-step."""
    state = fresh(setup)
    meta_step(setup, state)
    return {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, **snapshot(setup, state)}


@pytest.fixture
def content(whole: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(whole)


def write(path: Path, content: dict[str, Any]) -> Path:
    """A checkpoint file, whatever the content is."""
    optimizer = content.get("outer_optimizer")
    if isinstance(optimizer, dict) and isinstance(optimizer.get("state"), dict):
        words = {str(key): value for key, value in optimizer["state"].items()}
        content = content | {"outer_optimizer": optimizer | {"state": words}}
    path.write_bytes(archive.to_bytes(content, checkpoint.BY_OWN_NAME))
    return path


def test_the_untouched_checkpoint_passes(content: dict, setup: Setup, tmp_path: Path) -> None:
    restore(setup, checkpoint.load(write(tmp_path / "a.safetensors", content)))


NAN = float("nan")
ONE = torch.ones(1)
METRICS = {"loss": ONE, "score": ONE, "gradient_norm": ONE, "inner_losses": ONE[None], "own": {}}
WRONG = {
    "version": ["1", None, True, 0.5, -1],
    "config": [None, [], "x", {"seed": torch.ones(2)}, {"a": [{"b": torch.ones(1)}]}],
    "step": [-1, NAN, 1.0, "1", True, None, 2**62 + 1],
    "skipped": [-1, 2, "0"],
    "planned_for": [0, -1, None, "3"],
    "meta": [[], {"w": 1}, {"w": [torch.ones(1)]}, None],
    "outer_optimizer": [
        None,
        {},
        {"state": [], "param_groups": []},
        {"state": {"0": 1}, "param_groups": []},
        {"state": {"x": {}}, "param_groups": []},
        {"state": {}, "param_groups": [3]},
    ],
    "buffers": [None, [], {"b": 1}],
    "frozen": [None, [], {"b": 1}],
    "scheduler": [[], "cosine"],
    "best": [{}, {"step": 0, "score": NAN, "ci95": 0.0}, {"step": 5, "score": 1.0, "ci95": 0.0}, 3],
    "top": [{}, [1], [{"step": 0}]],
    "last_eval": [2, -1, None],
    "recent": [
        None,
        [1],
        torch.ones(2),
        {"loss": torch.ones(1)},
        METRICS | {"own": []},
        METRICS | {"loss": torch.ones(2)},
        METRICS | {"score": torch.ones(1).int()},
        METRICS | {"inner_losses": torch.ones(1)},
        METRICS | {"own": {"a": torch.ones(1, 1)}},
    ],
    "rng": [{}, {"cpu": torch.ones(3), "cuda": []}, {"cpu": torch.zeros(9).byte(), "cuda": [1]}],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_each_field_has_its_type(content: dict, tmp_path: Path, name: str, value: object) -> None:
    content[name] = value
    with pytest.raises(CheckpointError, match=f"'{name}' is missing or not what it should be"):
        checkpoint.load(write(tmp_path / "a.safetensors", content))
    del content[name]
    with pytest.raises(CheckpointError, match=f"'{name}' is missing"):
        checkpoint.load(write(tmp_path / "a.safetensors", content))


def test_what_does_not_fit_the_run_is_refused_before_the_next_step(
    content: dict, setup: Setup
) -> None:
    def refuses(change: Any, words: str) -> None:
        other = copy.deepcopy(content)
        change(other)
        with pytest.raises(CheckpointError, match=words):
            restore(setup, other)

    state = content["outer_optimizer"]["state"]
    assert state[0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    refuses(lambda c: c.update(step=10**9), "beyond the 2000 of this run")
    refuses(lambda c: c["meta"].update({"head.bias": torch.ones(2)}), "does not fit this network")
    refuses(lambda c: c["meta"].clear(), "does not fit this network")
    refuses(lambda c: c["meta"].update({"head.bias": torch.ones(1).double()}), "float64")
    refuses(lambda c: c["outer_optimizer"]["state"][0].pop("exp_avg"), "has not the entries")
    refuses(
        lambda c: c["outer_optimizer"]["state"][0].update(exp_avg=torch.ones(9)),
        "state.0.exp_avg has shape",
    )
    refuses(
        lambda c: c["outer_optimizer"]["param_groups"][0].update(lr="fast"),
        "param_groups.0.lr is of type str instead of float",
    )
    refuses(lambda c: c["outer_optimizer"]["param_groups"].clear(), "0 entries instead of 1")
    refuses(lambda c: c.update(scheduler=None), "scheduler is of type NoneType")
    refuses(lambda c: c["scheduler"].update(step=1), "scheduler has not the entries")
    groups = content["outer_optimizer"]["param_groups"]
    for name, value in [("betas", (1.0, 1.0)), ("eps", NAN), ("params", [0] * len(state))]:
        assert type(groups[0][name]) is type(value)
        refuses(lambda c: c["outer_optimizer"]["param_groups"][0].update({name: value}), name)  # noqa: B023
    for lr in (-1e-9, 1e18, NAN):
        refuses(lambda c: c["outer_optimizer"]["param_groups"][0].update(lr=lr), "or less")  # noqa: B023
        refuses(lambda c: c["scheduler"].update(_last_lr=[lr]), "_last_lr.0 is .* or less")  # noqa: B023
    for count in (-1.0, NAN):
        refuses(lambda c: c["outer_optimizer"]["state"][0]["step"].fill_(count), "is no count")  # noqa: B023
    refuses(lambda c: c["scheduler"].update(T_max=0), "scheduler.T_max is 0 instead of 2000")
    refuses(lambda c: c["scheduler"].update(base_lrs=[1e18]), r"base_lrs\.0 is 1e\+18 instead")
    refuses(lambda c: c["scheduler"].update(last_epoch=-2), "last_epoch is no count")
    refuses(lambda c: c["rng"].update(cpu=torch.zeros(7).byte()), "random state")


def test_a_config_in_a_checkpoint_names_components_and_nothing_else() -> None:
    plain = to_plain(config())
    assert from_plain(plain) == config()
    cases = [
        ({"algo": {"_target_": "os.system", "name": "maml"}}, "algo has no setting '_target_'"),
        ({"_target_": "os.system"}, "has no setting '_target_'"),
        ({"backbone": {"name": "os.system"}}, "needs backbone=os.system, unknown here$"),
        ({"backbone": {"name": "net"}, "plugins": ["evil"]}, r"give \+plugins=\[evil\]"),
        ({"backbone": {"name": ["mlp"]}}, "names no backbone"),
        ({"backbone": {"name": "mlp", "hidden": [[1]]}}, "must be list"),
        ({"backbone": {"name": "mlp", "hidden": [10**9]}}, "from 1 to 1000000"),
        ({"backbone": {"name": "mlp", "hidden": [1] * 9999}}, "1000 layers or fewer"),
        ({"task": {"way": 10**12}}, "task.way=1000000000000: must be from 1 to"),
        ({"task": None}, "task: expected settings"),
        ({"trainer": {"steps": "many"}}, "trainer.steps='many': must be int"),
        ({"trainer": {"steps": True}}, "trainer.steps=True: must be int"),
        ({"seed": 0.5}, "seed=0.5: must be int"),
        ({"plugins": [1]}, "plugins"),
        ({"algo": {"name": "maml", "inner_steps": 10**9}}, "from 0 to 100000"),
        ({"inner_opt": {"name": "sgd", "groups": [{"params": "*", "lr": []}]}}, "must be numbers"),
    ]
    for change, words in cases:
        with pytest.raises(CheckpointError, match=words):
            from_plain(plain | change)
    assert "evil" not in sys.modules


def test_a_network_larger_than_memory_is_refused_before_it_is_filled() -> None:
    side = int((machine_memory() / 4) ** 0.5)  # a layer as large as the memory
    layers = [side // 2] * 9  # of which each would fit
    with pytest.raises(ConfigError, match="more than this machine has memory for"):
        build(config(backbone=MlpConfig(hidden=layers)), torch.device("cpu"))
    code = explain(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")), 1
    assert code[0][0].startswith("out of memory") and code[0][1] == 1


def test_tasks_larger_than_memory_are_refused_before_they_are_drawn() -> None:
    absurd = config()
    absurd.task.shot = absurd.trainer.meta_batch = 100_000
    with pytest.raises(ConfigError, match="more than the memory of this machine"):
        build(absurd, torch.device("cpu"))


def test_a_checkpoint_does_not_say_where_to_download_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METARUN_DATA", raising=False)
    stored = config(data=OmniglotConfig(root="/elsewhere"), backbone=Conv4Config())
    asked = EvalConfig(ckpt="x")
    assert changed(stored, asked).data == OmniglotConfig(root="/elsewhere", download=False)
    asked.data.download = True
    assert changed(stored, asked).data.download
    asked.data.download, stored.data.root = None, None  # the user's own cache
    assert changed(stored, asked).data.download


# ---------------------------------------------------------------- run directories and data


def test_a_stored_config_is_text_and_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "do-not-show")
    (tmp_path / "config.yaml").write_text("seed: ${oc.env:SECRET}\n")
    with pytest.raises(ConfigError, match="another config") as caught:
        rundir.finished_result(tmp_path, {"seed": 1})
    assert "do-not-show" not in str(caught.value) and "${oc.env:SECRET}" in str(caught.value)
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    bombs = ["\n".join(["a0: &a0 [x]", *levels]), "[" * 100_000, "a: !!python/object:os.x {}"]
    for bomb in bombs:
        (tmp_path / "config.yaml").write_text(bomb)
        with pytest.raises(ConfigError, match="damaged"):
            rundir.finished_result(tmp_path, {"seed": 1})
    (tmp_path / "status.json").write_text("[" * 100_000)
    assert rundir.read_status(tmp_path) == {}


def test_messages_do_not_steer_the_terminal() -> None:
    shown, _ = explain(CheckpointError("bad name \x1b[2J\x07 in\na file"))
    assert shown == "bad name \\x1b[2J\\x07 in\na file"


def png(size: tuple[int, int], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("1", size, 1).save(buffer, kind)
    return buffer.getvalue()


def test_only_small_png_files_are_drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shrink(png((105, 105))) == bytes(28 * 28)
    with pytest.raises(ValueError, match="5000x5000 pixels"):
        shrink(png((5000, 5000)))
    with pytest.raises(Image.DecompressionBombError):
        shrink(png((14_000, 14_000)))
    with pytest.raises(OSError, match="cannot identify"):
        shrink(png((105, 105), "BMP"))
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "omniglot" / "Greek" / "character01"
    folder.mkdir(parents=True)
    for person in range(20):
        (folder / f"0001_{person + 1:02d}.png").write_bytes(png((105, 105)))
    last = folder / "0001_20.png"
    last.unlink()
    os.mkfifo(last)  # reading it would wait for ever
    with pytest.raises(DataError, match="no drawing of Omniglot"):
        characters(tmp_path, download=False, expected=["Greek/character01"])
    last.unlink()
    last.symlink_to("/etc/passwd")
    with pytest.raises(DataError, match="cannot identify image file") as caught:
        characters(tmp_path, download=False, expected=["Greek/character01"])
    assert "root:" not in str(caught.value)


def test_a_bomb_among_the_drawings_of_a_zip_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    for part, alphabet in (("images_background", "Greek"), ("images_evaluation", "Keble")):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for person in range(20):
                body = png((105, 105)) if person else bytes(10**8)
                archive.writestr(f"{part}/{alphabet}/character01/0_{person:02d}.png", body)
    names = ["Greek/character01", "Keble/character01"]
    with pytest.raises(DataError, match="no drawing of Omniglot: 100000000 bytes"):
        characters(tmp_path, download=False, expected=names)


def test_a_cache_with_one_wrong_bit_is_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = torch.randint(1, 255, (2, 3, 1, 4, 4), dtype=torch.uint8)
    store = from_equal_classes(images, ["a", "b"])
    path = tmp_path / "cache.safetensors"
    cached(path, lambda: store)
    data = bytearray(path.read_bytes())
    data[data.find(images.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    again = cached(path, lambda: store)
    assert torch.equal(again.images, store.images) and "rebuilding the damaged cache" in caplog.text


def test_a_short_campaign_of_the_fuzzer(environment: dict[str, str]) -> None:
    """`make fuzz` has the long one."""
    done = subprocess.run(
        [sys.executable, str(REPO / "scripts" / "fuzz.py"), "--cases", "150", "--seed", "7"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "150 cases, seed 7" in done.stdout and "0 failures" in done.stdout
