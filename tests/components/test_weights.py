"""First weights from a file: what fits, what is left out, what is refused. And frozen parts."""

import logging
import pickle
from pathlib import Path
from typing import Any

import easyfsl.modules as easyfsl
import pytest
import timm as library
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from metarun.cli.eval import run as evaluate
from metarun.components.backbone.conv4 import Conv4Config, conv4
from metarun.components.backbone.norm import BatchNorm
from metarun.components.backbone.resnet12 import resnet12
from metarun.components.backbone.timm import timm
from metarun.components.weights import freeze, load_weights
from metarun.config.trained import EvalConfig
from metarun.errors import ConfigError
from metarun.rundir import checkpoint
from metarun.training.loop import meta_step
from metarun.training.state import fresh, restore_meta, snapshot
from tests.setups import IMAGES, setup_of, task_of

SHAPE = (1, 28, 28)


def net(seed: int = 0, **own: Any) -> Any:
    torch.manual_seed(seed)
    return conv4(SHAPE, own.pop("outputs", 3), width=3, **own)


def saved(path: Path, tensors: Any) -> str:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return str(path)


def same(one: nn.Module, other: nn.Module, begin: str = "") -> bool:
    there = other.state_dict()
    return all(
        torch.equal(value, there[name])
        for name, value in one.state_dict().items()
        if name.startswith(begin)
    )


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_a_file_gives_a_backbone_its_weights(name: str, tmp_path: Path) -> None:
    source, model = net(1), net(2)
    load_weights(model, saved(tmp_path / name, source.state_dict()))
    assert same(source, model)


@pytest.mark.parametrize("before", ["module.", "encoder.", "module.model."])
@pytest.mark.parametrize("container", [None, "state_dict", "params"])
def test_what_other_codes_put_around_weights_is_no_matter(
    before: str, container: str | None, tmp_path: Path
) -> None:
    source, model = net(1), net(2)
    tensors: Any = {before + n.removeprefix("body."): v for n, v in source.state_dict().items()}
    tensors = tensors if container is None else {container: tensors, "epoch": 3}
    load_weights(model, saved(tmp_path / "w.pt", tensors))
    assert same(source, model)


def test_a_head_of_another_shape_or_name_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source, model, drawn = net(1, outputs=64), net(2), net(2)
    load_weights(model, saved(tmp_path / "w.pt", source.state_dict()))
    assert same(source, model, "body.") and same(drawn, model, "head.")
    assert "not taken: head.weight, head.bias; as drawn: head.weight, head.bias" in caplog.text
    body = {n: v for n, v in source.state_dict().items() if n.startswith("body.")}
    for extra in ({}, {"fc.weight": torch.ones(2)}, {"module.classifier.bias": torch.ones(2)}):
        model = net(2)
        load_weights(model, saved(tmp_path / "w.pt", body | extra))
        assert same(source, model, "body.") and same(drawn, model, "head.")


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: v for n, v in tensors.items() if n != name}


REFUSED = {
    "shape": (
        lambda w: w | {"body.1.conv.weight": torch.ones(3, 4, 3, 3)},
        r"of another shape: body.1.conv.weight is \(3, 4, 3, 3\) there and \(3, 3, 3, 3\) here\. ",
    ),
    "missing": (lambda w: without(w, "body.2.norm.bias"), r"not in the file: body.2.norm.bias\. "),
    "unknown": (
        lambda w: w | {"body.4.conv.weight": torch.ones(1)},
        r"not in the network: body.4.conv.weight\. ",
    ),
    "twice": (
        lambda w: w | {"module.body.0.conv.bias": torch.ones(3)},
        r"not in the network: module.body.0.conv.bias \(a second body.0.conv.bias\)",
    ),
    "many": (
        lambda w: {"other": torch.ones(1)},
        r"not in the file: body.0.conv.weight, body.0.conv.bias, .* and 12 more; not in the",
    ),
    "averages": (
        lambda w: w | {f"body.0.norm.running_{k}": torch.ones(9) for k in ("mean", "var")},
        "of another shape: the running statistics of body.0.norm",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_of_another_network_are_refused_and_nothing_is_loaded(
    case: str, tmp_path: Path
) -> None:
    change, message = REFUSED[case]
    source, model, drawn = net(1), net(2), net(2)
    path = saved(tmp_path / "w.pt", change(source.state_dict()))  # type: ignore[no-untyped-call]
    with pytest.raises(ConfigError, match=message) as caught:
        load_weights(model, path)
    assert f"backbone.weights={path}: nothing was loaded" in str(caught.value)
    assert same(drawn, model)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this runs",)


def test_what_is_no_file_of_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = net(), tmp_path / "w.pt"
    with pytest.raises(ConfigError, match=r"there is no such file\. metarun downloads no weights"):
        load_weights(model, str(path))
    for content in (pickle.dumps(Evil()), b"", b"text", b"\x80\x02."):
        for name in ("w.pt", "w.safetensors"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ConfigError, match="cannot be read as weights alone"):
                load_weights(model, str(tmp_path / name))
    torch.save(Evil(), path)
    with pytest.raises(ConfigError, match="cannot be read as weights alone"):
        load_weights(model, str(path))
    assert "this runs" not in capsys.readouterr().out
    for empty in ({}, [torch.ones(2)], {"a": 3}, torch.ones(2), {"state_dict": {}}):
        torch.save(empty, path)
        with pytest.raises(ConfigError, match="holds no weights by name"):
            load_weights(model, str(path))
    with pytest.raises(ConfigError, match="no run directory with a checkpoint in it"):
        (tmp_path / "folder").mkdir()
        load_weights(model, str(tmp_path / "folder"))


def test_running_statistics_begin_the_moving_averages(tmp_path: Path) -> None:
    """Pretrained features by running statistics are those of the network in its own code."""
    torch.manual_seed(0)
    theirs = torchvision.models.shufflenet_v2_x0_5(weights=None)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    path = saved(tmp_path / "w.pth", theirs.state_dict())
    setup = setup_of(
        *IMAGES[:1], "backbone=torchvision", "backbone.model=shufflenet_v2_x0_5", "algo=protonet",
        f"backbone.weights={path}", "backbone.norm=running", "task.way=3", "task.query=2",
        "engine.precision=float64", "engine.compile=none",
    )  # fmt: skip
    theirs.fc = nn.Identity()  # type: ignore[assignment]
    theirs.double().eval()
    task, meta = task_of(setup), setup.algorithm.init()
    assert setup.algorithm.adapt is not None
    scores = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)(task.query_x)
    with torch.no_grad():
        support, query = (theirs(x.expand(-1, 3, -1, -1)) for x in (task.support_x, task.query_x))
    means = torch.stack([support[task.support_y == k].mean(0) for k in range(3)])
    expected = -(query[:, None] - means).pow(2).sum(-1)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)


def test_weights_of_the_fields_codes_fit(tmp_path: Path) -> None:
    with torch.device("meta"):
        theirs, model = easyfsl.feat_resnet12(), resnet12((3, 84, 84), 5)
    model.to_empty(device="cpu")
    tensors = {f"encoder.{n}": torch.zeros(v.shape) for n, v in theirs.state_dict().items()}
    tensors["encoder.layer3.0.conv2.weight"] += 7
    load_weights(model, saved(tmp_path / "w.pth", {"params": tensors}))
    assert (model.body.layer3[0].conv2.weight == 7).all()  # type: ignore[index,union-attr]
    layers = [m for m in model.modules() if isinstance(m, BatchNorm)]
    assert len(layers) == 16 and all(layer.averages is not None for layer in layers)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_weights_of_timm_fit_whatever_its_head(name: str, tmp_path: Path) -> None:
    shape = (3, 32, 32)
    options = {"img_size": 32} if "vit" in name else {}
    theirs = library.create_model(name, num_classes=7, **options).eval()
    path = saved(tmp_path / "w.safetensors", theirs.state_dict())
    model: Any = timm(shape, 7, model=name)
    load_weights(model, path)
    assert torch.equal(model.head.weight, theirs.get_classifier().weight)
    other: Any = timm(shape, 5, model=name)
    load_weights(other, path)
    x = torch.rand(4, *shape)
    torch.testing.assert_close(other.features(x), model.features(x))
    if "vit" in name:  # which has no batch normalisation
        torch.testing.assert_close(model.eval()(x), theirs(x))


def test_a_run_of_metarun_gives_its_best_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another algorithm: pretrained by one, meta-learned by another."""
    caplog.set_level(logging.INFO)
    before = setup_of(*IMAGES, "algo=protonet", "backbone.norm=running")
    state = fresh(before)
    meta_step(before, state)
    best = {name: value.detach().clone() for name, value in state.meta.items()}
    checkpoint.save_best(tmp_path / "pre" / "checkpoints", snapshot(before, state), [1], 1)
    meta_step(before, state)
    checkpoint.save(tmp_path / "pre" / "checkpoints", snapshot(before, state), 1, None)
    after = setup_of(*IMAGES, f"backbone.weights={tmp_path}/pre", "backbone.norm=running")
    assert "16 tensors; as drawn: head.weight, head.bias" in caplog.text
    meta = after.algorithm.init()
    assert not torch.equal(best["norm.0.mean"], torch.zeros(3))
    assert all(torch.equal(meta[name], value) for name, value in best.items())
    # An evaluation has what the checkpoint holds, and asks for no file.
    checkpoint.save(tmp_path / "next" / "checkpoints", snapshot(after, fresh(after)), 1, None)
    (tmp_path / "pre").rename(tmp_path / "gone")
    score = evaluate(EvalConfig(str(tmp_path / "next"), episodes=2), tmp_path / "eval")
    assert 0 <= score <= 1
    with pytest.raises(ConfigError, match=r"backbone\.weights=.*pre: there is no such file"):
        setup_of(*IMAGES, f"backbone.weights={tmp_path}/pre")


def test_the_file_of_weights_is_named() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.weights is empty"):
        Conv4Config(weights=" ")


def test_frozen_parameters_are_not_learned() -> None:
    setup = setup_of(*IMAGES, "backbone.frozen=['body.[01].*']", "algo.order=2")
    state = fresh(setup)
    before = {name: p.clone() for name, p in setup.network.frozen.items()}
    assert {name.split(".")[1] for name in before} == {"0", "1"}
    assert not set(before) & set(state.meta)
    meta_step(setup, state)
    assert all(torch.equal(p, setup.network.frozen[name]) for name, p in before.items())
    other = setup_of(*IMAGES, "backbone.frozen=['body.[01].*']", "seed=5")
    restore_meta(other, snapshot(setup, state))
    assert all(torch.equal(p, other.network.frozen[name]) for name, p in before.items())


def test_the_features_of_a_frozen_body_are_computed_once_a_task() -> None:
    """Whatever the inner steps: MAML then adapts the head alone."""
    setup = setup_of(*IMAGES, "backbone.frozen=['body.*']", "algo.inner_steps=5")
    calls = []
    setup_model = setup.network
    assert {name.split(".")[0] for name in setup_model.frozen} == {"body"}
    assert setup.algorithm.adapted == ("head.weight", "head.bias")
    original = BatchNorm.forward

    def counted(self: BatchNorm, x: Tensor) -> Tensor:
        calls.append(x.shape)
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchNorm, "forward", counted)
        setup.algorithm.loss(setup.algorithm.init(), task_of(setup))
    assert len(calls) == 2 * 4  # support and queries, by four layers


def test_patterns_of_frozen_parameters_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"backbone.frozen: no parameter matches 'bdy.\*'; there"):
        freeze(net(), ["bdy.*"])
    with pytest.raises(ConfigError, match=r"leaves nothing to learn: freeze less, e.g. \['body"):
        freeze(net(), ["*"])
    model = net()
    freeze(model, ["head.bias"])
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]
    with pytest.raises(ConfigError, match=r"algo.adapt: 'body.\*' names only parameters that the"):
        setup_of(*IMAGES, "backbone.frozen=['body.*']", "algo.adapt=['body.*']")
    with pytest.raises(ConfigError, match="algo=protonet has nothing to learn: what it uses"):
        setup_of(*IMAGES, "backbone.frozen=['body.*']", "algo=protonet")
