"""Which device a run takes."""

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from metarun.errors import ConfigError
from metarun.sweeps.job import _turn
from metarun.system.ranks import Ranks
from metarun.system.turns import taking_turn, turn
from metarun.training import device


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with three GPUs, whose settings are left as they are."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setattr(device, "set_cudnn", lambda *_, **__: None)


@pytest.mark.usefixtures("three_gpus")
def test_runs_of_a_machine_take_its_gpus_in_turn() -> None:
    found = []
    for number in range(4):
        with taking_turn(number):
            found.append(str(device.choose_device("auto")))
            assert str(device.choose_device("cuda:2")) == "cuda:2"
            assert str(device.choose_device("cpu")) == "cpu"
    assert found == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert turn() == 0, "a run alone takes the first one"


@pytest.mark.usefixtures("three_gpus")
def test_ranks_take_their_own() -> None:
    with taking_turn(1):
        assert str(device.choose_device("cuda", Ranks(2, 3, local=2))) == "cuda:2"
    with pytest.raises(ConfigError, match="rank 3 has no GPU of its own: torch sees 3 CUDA"):
        device.choose_device("cuda", Ranks(3, 4, local=3))
    with pytest.raises(ConfigError, match="device=cuda:3: torch sees 3 CUDA devices"):
        device.choose_device("cuda:3")


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", 5),
        ("hydra._internal.core_plugins.basic_launcher.BasicLauncher", 0),
        ("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", 0),
    ],
)
def test_only_runs_that_share_a_machine_have_a_number(
    launcher: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = OmegaConf.create({"launcher": {"_target_": launcher}, "job": {"num": 5}})
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: given))
    assert _turn() == number
