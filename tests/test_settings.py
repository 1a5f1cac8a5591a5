"""No setting is ignored: each one changes what it says, or is named inert here with the reason.

A new field of any schema takes part by itself. It then needs an entry below if half of its value
is not allowed, if it matters in company only, or if it is meant to change nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metarun.cli.eval import run as evaluate
from metarun.components.data import cub, emoji, glyphs, omniglot
from metarun.components.data._class_lists import ClassList
from metarun.components.data._emoji_packages import SETS
from metarun.components.data.splits import omniglot_names
from metarun.config.augment import OF_COLOUR, AugmentConfig
from metarun.config.catalogue import GROUPS, schemas
from metarun.config.run import (
    NEUTRAL_KEYS,
    EngineConfig,
    TaskConfig,
    TrainConfig,
    TrainerConfig,
    TrainTaskConfig,
)
from metarun.config.trained import (
    EvalAlgo,
    EvalBackbone,
    EvalConfig,
    EvalData,
    EvalEngine,
    EvalTask,
)
from metarun.episodes.store import ClassStore, from_equal_classes
from metarun.errors import MetarunError
from metarun.rundir.metrics import read_metrics
from metarun.system.interrupts import Interruption
from metarun.training.loop import meta_step, train
from metarun.training.result import finish
from metarun.training.setup import build
from metarun.training.state import fresh
from metarun.training.tracker import Tracker

Changes = dict[str, Any]
PARTS = {
    "task": TaskConfig,
    "augment": AugmentConfig,
    "trainer": TrainerConfig,
    "engine": EngineConfig,
}
DEFAULTS = {
    "algo": "maml",
    "data": "sinusoid",
    "backbone": "mlp",
    "inner_opt": "sgd",
    "outer_opt": "adam",
}
SMALL: Changes = {
    "algo.inner_steps": 2,
    "algo.eval_inner_steps": 2,
    "backbone.hidden": [4],
    "backbone.width": 3,
    "task.way": 2,
    "task.shot": 2,
    "task.query": 2,
    "trainer.steps": 4,
    "trainer.meta_batch": 2,
    "trainer.eval_every": 2,
    "trainer.eval_episodes": 3,
    "trainer.test_episodes": 3,
    "trainer.checkpoint_every": 1,
    "trainer.log_every": 2,
    "engine.precision": "float64",
    "engine.compile": "none",
}
IMAGES: Changes = {"data": "glyphs", "backbone": "mlp"}

OTHER: Changes = {
    # by the end of the key: what else it may be, where half of it or its contrary will not do
    "eps": 0.1,
    "clip_norm": 0.01,
    "clip_value": 0.01,
    "learn": ["lr"],
    "granularity": "parameter",
    "inner_precision": "bf16",
    "groups": [{"params": "head.*", "lr": 0.02}],
    "newton.learn": ["trust_radius"],
    "newton.groups": [{"params": "head.*", "trust_radius": 0.02}],
    "newton.trust_radius": 0.02,
    "partition.learn": ["0.lr"],
    "partition.groups": [{"params": "head.*", "1.trust_radius": 0.02}],
    "partition.parts": [{"params": "*", "name": "sgd", "lr": 0.02}],
    **{
        f"outer_opt.{name}.groups": [{"params": "head.*", "lr_factor": 3.0}]
        for name in ("adam", "adamw", "sgd")
    },
    "rprop.eta_plus": 1.7,
    "rprop.step_size_min": 0.5,
    "rprop.step_size_max": 0.001,
    "asgd.lambd": 0.5,
    "adafactor.eps1": 0.5,
    "adafactor.eps2": 3.0,
    "adafactor.d": 4.0,
    "muon.groups": [{"params": "head.*", "lr": 0.03}],
    "muon.ns_steps": 2,
    "muon.adjust_lr_fn": "match_rms_adamw",
    "muon.ns_precision": "full",
    "order": 1,
    "proto_maml.order": 2,
    "unicorn_maml.order": 2,
    "sparse_maml.order": 2,
    "adapt": ["head.*"],
    "anil.adapt": ["head.bias"],
    "reduction": "per_shot",
    "outer_reduction": "per_shot",
    "conv4.pool": "max",
    "norm": "support",
    "conv4.order": "pool_norm_relu",
    "conv4.padding": "same",
    "conv4.features": "flatten",
    "init": "maml",
    "stem": "imagenet",
    "drop_size": 2,
    "torchvision.model": "mnasnet0_5",
    "timm.model": "test_efficientnet",
    "l2l.model": "OmniglotFC",
    "widths": [3, 4, 5, 6],
    "frozen": ["body.*"],
    "torchvision.frozen": ["body.conv1.*"],
    "wrn28_10.frozen": ["body.conv1.*"],
    "per_step": ["body.*"],
    "multi_step_loss": 3,
    "first_order_until": 1,
    "maml_pp.multi_step_loss": 0,
    "maml_pp.per_step": ["body.0.bias"],
    "anil.per_step": ["head.bias"],
    "boil.per_step": ["body.0.bias"],
    "meta_sgd.rate_low": 0.05,
    "imaml.variant": "code",
    "cavia.contexts": 3,
    "cavia.layer": "head",
    "eval.backbone.norm": "support",
    "metaoptnet.head": "ridge",
    "metaoptnet.iterations": 1,
    "metaoptnet.eval_iterations": 1,
    "metaoptnet.tolerance": 1e-30,
    "metaoptnet.variant": "code",
    "dkt.kernel": "rbf",
    "cnp.encoder": [16],
    "cnp.decoder": [16],
    "cnp.heads": 4,
    "cnp.latent": 4,
    "cnp.samples": 3,
    "mlp.hidden": [3],
    "hidden": [3],
    "relationnet.hidden": 3,
    "omniglot.split": "vinyals",
    "emoji.split": "group",
    "emoji.twins": "keep",
    "multi.sources": [{"name": "glyphs"}, {"name": "glyphs", "seed": 1}],
    "weigh": "examples",
    "label_noise": 1.0,
    "reptile.inner_batch": 1,
    "baseline.inner_batch": 1,
    "baseline_pp.inner_batch": 1,
    "baseline_pp.scale": 3.0,
    "matchingnet.reads": 1,
    "relationnet.class_map": "mean",
    "simpleshot.transform": "l2n",
    "relationnet.loss": "cross_entropy",
    "protonet.scale": 3.0,
    "protonet.distance": "cosine",
    "schedule": "cosine",
    "min_lr": 0.0005,
    "schedule_steps": 3,
    "asgd.schedule_steps": 5,
    "precondition": "meta_curvature",
    "engine.precision": "float32",
    "identity.frozen": ["head.bias"],
    "resize": "stretch",
    "filter": "nearest",
    "color": "grey",
    "fractions": [0.4, 0.3, 0.3],
    "cub.resize": "crop",
    "cub.split": "140-30-30",
    "engine.gradient": "first_order",
    "engine.solver": "fixed_point",
    "engine.batching": "loop",
    "engine.chunk": 1,
    "engine.compile": "replay",
    "engine.cuda_graphs": False,
    "engine.block": 2,
    **{f"augment.{own.name}": 0.25 for own in fields(AugmentConfig)},
    "augment.crop": 2,
    "augment.rotation": 20.0,
    "augment.scale": [0.8, 1.2],
    "augment.shear": 20.0,
    "augment.support": [],
    "augment.query": [],
    "trainer.eval_every": 4,
    "trainer.checkpoint_every": 2,
    "trainer.keep_last": 3,
    "trainer.keep_best": 2,
    "trainer.keep_every": 2,
    "trainer.log_every": 1,
    "trainer.nonfinite": "skip",
    "trainer.max_skipped": 2,
    "trainer.steps": 5,
    "trainer.meta_batch": 3,
    "task.train.way": 3,
    "task.train.shot": 1,
    "task.train.query": 3,
    "task.within": "group",
    "task.train.within": "group",
    "min_way": 2,
    "min_shot": 1,
    "imbalanced": True,
    "max_support": 4,
    "train.seed": 7,
    "eval.split": "train",
    "eval.episodes": 2,
    "eval.seed": 7,
    "eval.engine.batching": "loop",
    "eval.engine.chunk": 1,
    "eval.engine.precision": "bf16",
    "eval.task.way": 3,
    "eval.task.shot": 3,
    "eval.task.query": 3,
    "eval.task.within": "group",
    "eval.task.min_way": 1,
    "eval.task.min_shot": 1,
    "eval.task.imbalanced": True,
    "eval.task.max_support": 4,
    "eval.algo.eval_inner_steps": 3,
}

COMPANY: dict[str, Changes] = {
    "engine.inner_precision": {"engine.precision": "float32"},
    # by the end of the key: the settings in whose company it matters
    "granularity": {"inner_opt.learn": ["lr"]},
    "newton.granularity": {"inner_opt.learn": ["trust_radius"]},
    "partition.granularity": {"inner_opt.learn": ["0.lr"]},
    "dampening": {"inner_opt.momentum": 0.5},
    "inner_opt.sgd.nesterov": {"inner_opt.momentum": 0.5},
    "outer_opt.sgd.nesterov": {"outer_opt.momentum": 0.5},
    "amsgrad": {"inner_opt.beta2": 0.1, "inner_opt.lr": 1.0, "algo.inner_steps": 4},
    "decoupled_weight_decay": {"inner_opt.weight_decay": 0.5},
    "radam.beta2": {"algo.inner_steps": 7},
    "radam.eps": {"algo.inner_steps": 7},
    "rprop.eta_minus": {"inner_opt.lr": 5.0, "algo.inner_steps": 3},
    "reduction": IMAGES,
    "outer_reduction": IMAGES,
    "glyphs.seed": IMAGES,
    "multi.sources": {"backbone": "mlp", "data.sources": [{"name": "glyphs"}, {"name": "glyphs"}]},
    "omniglot.split": {**IMAGES, "data": "omniglot"},
    "omniglot.split_seed": {**IMAGES, "data": "omniglot"},
    "omniglot.rotations": {**IMAGES, "data": "omniglot"},
    "min_lr": {"outer_opt.schedule": "cosine"},
    "task.way": IMAGES,
    "task.within": IMAGES,
    "task.train.within": IMAGES,
    "task.train.way": {**IMAGES, "algo": "protonet"},
    "min_way": {**IMAGES, "task.way": 4},
    "min_shot": {**IMAGES, "task.shot": 3},
    "imbalanced": {**IMAGES, "task.shot": 3},
    "task.max_support": {**IMAGES, "task.shot": 3, "task.imbalanced": True},
    "task.train.max_support": {**IMAGES, "task.shot": 3, "task.train.imbalanced": True},
    "r2d2.scale": IMAGES,
    "proto_maml.first_order_until": {"algo.order": 2},
    "unicorn_maml.first_order_until": {"algo.order": 2},
    "sparse_maml.first_order_until": {"algo.order": 2},
    "feat.temperature": IMAGES,
    "feat.balance": IMAGES,
    "feat.contrast_temperature": IMAGES,
    "feat.dropout": IMAGES,
    "feat.attention_dropout": IMAGES,
    "meta_baseline.temperature": IMAGES,
    "simpleshot.batch_size": IMAGES,
    "simpleshot.transform": IMAGES,
    "simpleshot.momentum": IMAGES,
    "relationnet.hidden": IMAGES,
    "relationnet.class_map": IMAGES,
    "relationnet.loss": IMAGES,
    "matchingnet.full_context": IMAGES,
    "matchingnet.reads": {**IMAGES, "algo.full_context": True},
    "matchingnet.scale": IMAGES,
    "matchingnet.relu": {**IMAGES, "algo.full_context": True},
    "metaoptnet.head": IMAGES,
    "metaoptnet.cost": IMAGES,
    "metaoptnet.ridge": {**IMAGES, "algo.head": "ridge"},
    "metaoptnet.iterations": {**IMAGES, "algo.tolerance": 1e9},
    "metaoptnet.eval_iterations": {**IMAGES, "algo.tolerance": 1e9},
    "metaoptnet.tolerance": IMAGES,
    "metaoptnet.variant": IMAGES,
    "metaoptnet.scale": IMAGES,
    "metaoptnet.label_smoothing": IMAGES,
    "cnp.heads": {"algo.attention": True},
    "cnp.samples": {"algo.latent": 4},
    "dkt.output_scale": IMAGES,
    "dkt.length_scale": {"algo.kernel": "rbf"},
    "baseline.batch_size": IMAGES,
    "baseline.eval_inner_steps": IMAGES,
    "baseline.inner_batch": IMAGES,
    "baseline_pp.batch_size": IMAGES,
    "baseline_pp.eval_inner_steps": IMAGES,
    "baseline_pp.inner_batch": IMAGES,
    "baseline_pp.scale": IMAGES,
    "baseline_pp.weight_norm": IMAGES,
    "protonet.distance": IMAGES,
    "protonet.normalise": IMAGES,
    "protonet.scale": IMAGES,
    "transductive_finetuning.batch_size": IMAGES,
    "transductive_finetuning.eval_inner_steps": IMAGES,
    "transductive_finetuning.entropy": IMAGES,
    "engine.last": {"engine.gradient": "truncated", "algo.inner_steps": 3},
    "engine.proximal": {"engine.gradient": "implicit"},
    "engine.solver": {"engine.gradient": "implicit"},
    "engine.solver_steps": {"engine.gradient": "implicit"},
    "engine.solver_lr": {"engine.gradient": "implicit", "engine.solver": "neumann"},
    "engine.samples": {"engine.gradient": "evolution", "engine.batching": "loop"},
    "engine.sigma": {"engine.gradient": "evolution", "engine.batching": "loop"},
    "engine.block": {"engine.gradient": "checkpoint"},
    "trainer.steps": {"outer_opt.schedule": "cosine"},
    "trainer.nonfinite": {"inner_opt.lr": 1e300},
    "trainer.max_skipped": {"inner_opt.lr": 1e300, "trainer.nonfinite": "skip"},
}

OF_IMAGES: dict[str, Changes] = {
    **{name: {} for name in schemas("backbone") if name != "mlp"},
    "r2d2": {"backbone.widths": [2, 2, 3, 3], "backbone.dropout": 0.0},
    "resnet12": {"backbone.widths": [2, 2, 3, 3]},
    "timm": {"backbone.model": "test_resnet"},
    "torchvision": {"backbone.model": "shufflenet_v2_x0_5", "algo": "protonet"},
    "wrn28_10": {"backbone.widen": 1, "algo": "protonet"},
}
"""The backbones for images, each as small as it can be."""
COMPANY |= {
    f"backbone.{name}.{own.name}": {"data": "glyphs", **small}
    for name, small in OF_IMAGES.items()
    for own in fields(schemas("backbone")[name])
    if own.name != "name"
}

EXAMPLES: Changes = {
    "algo": "supervised", "data": "glyphs_examples", "data.classes": 4, "data.held_out": 1,
    "data.val": 1, "data.test": 1, "algo.batch_size": 3, "trainer.meta_batch": 1,
    **{f"task.{own.name}": own.default for own in fields(TaskConfig) if own.name != "train"},
}  # fmt: skip
"""One model on labelled examples, where no setting of tasks may be given."""
OF_EXAMPLES: dict[str, Changes] = {
    "algo.look_ahead": {"algo": "look_ahead", "inner_opt.learn": ["lr"]},
    "algo.supervised": {},
    "data.glyphs_examples": {},
    "data.omniglot_examples": {"data": "omniglot_examples"},
}
COMPANY |= {
    f"{part}.{own.name}": EXAMPLES | more
    for part, more in OF_EXAMPLES.items()
    for own in fields(schemas(part.partition(".")[0])[part.partition(".")[2]])
    if own.name != "name"
}
COMPANY["algo.look_ahead.units"] |= {"algo.weigh": "network"}
COMPANY["backbone.conv4.order"] = {"data": "glyphs", "backbone.pool": "max"}
COMPANY["backbone.resnet12.drop_size"] |= {"backbone.drop": 0.5}

FALLING: Changes = {"inner_opt.schedule": "cosine"}
COMPANY |= {
    f"inner_opt.{name}.{key}": FALLING
    for name, schema in schemas("inner_opt").items()
    for key in ("min_lr", "schedule_steps")
    if hasattr(schema, key)
}
SMALL_FILES: dict[str, Changes] = {
    "folder": {"data.root": "pictures", "data.size": 4},
    "features": {"data.root": "features.npz"},
    "cub": {"data.root": "pictures", "data.size": 4},
    "emoji": {"data.size": 8},
}
"""What `small_data` puts into the current folder."""
COMPANY |= {
    f"data.{name}.{own.name}": small
    for name, small in SMALL_FILES.items()
    for own in fields(schemas("data")[name])
    if own.name != "name"
}
COMPANY["data.cub.crop"] = SMALL_FILES["cub"] | {"data.resize": "crop"}
COMPANY |= {f"augment.{own.name}": IMAGES for own in fields(AugmentConfig)}
COMPANY |= {
    f"augment.{name}": IMAGES | {"augment.crop": 2} for name in ("fill", "support", "query")
}
COMPANY |= {
    f"augment.{name}": IMAGES | {"data": "emoji", **SMALL_FILES["emoji"]} for name in OF_COLOUR
}
LATE: Changes = {"algo.inner_steps": 4, "algo.eval_inner_steps": 4}
COMPANY |= {  # ASGD takes the rate that it computed a step before
    "inner_opt.asgd.schedule": LATE,
    "inner_opt.asgd.min_lr": LATE | FALLING,
    "inner_opt.asgd.schedule_steps": LATE | FALLING,
}

COMPUTED = "how tasks are computed"
INERT = {
    "train.device": "where it is computed",
    "train.plugins": "modules to import; a component must be chosen to matter",
    "inner_opt.asgd.t0": "the average of ASGD, which starts there, is not what the loop ends with",
    "resnet12.features": "the last maps of 28 pixels are 1×1: tests/components/test_residual.py",
    "weights": "a file that has to be there: tests/components/test_weights.py",
    "data.omniglot_examples.root": "where the data lie",
    "data.omniglot_examples.download": "how they come there",
    "data.omniglot.root": "where the data lie",
    "folder.root": "where the data lie",
    "lake.root": "where the data lie",
    "emoji.root": "where the data lie",
    "multi.root": "where the data lie",
    "multi.shape": "for images that do not agree: tests/cli/test_cli_multi.py",
    "features.root": "where the data lie",
    "folder.layout": "how the pictures lie: tests/pictures/test_layouts.py",
    "skip_unreadable": "a picture that has to be damaged: tests/pictures/test_convert.py",
    "download": "how they come there",
    "npz_channels": "of files that are not here: tests/components/test_tiered_imagenet.py",
    "cub.root": "where the data lie",
    "cub.layout": "how they lie: tests/components/test_cub.py",
    "engine.batching": COMPUTED,
    "engine.chunk": COMPUTED,
    "engine.compile": COMPUTED,
    "engine.cuda_graphs": "how a GPU is told what to compute, with the same bits",
    "engine.block": "what is remembered; the gradient is exact for any",
    "trainer.wandb": "a second place for the same figures",
    "trainer.wandb_project": "a name at that place",
    "eval.ckpt": "what is evaluated",
    "trainer.ensemble": "a second figure beside the first: tests/training/test_ensemble.py",
    "eval.ensemble": "needs several checkpoints: tests/training/test_ensemble.py",
    "eval.assign": "a figure beside the score: tests/inference/test_assignment.py",
    "eval.confusion": "figures beside the score: tests/inference/test_confusion.py",
    "eval.calibrate": "figures beside the score: tests/inference/test_calibration.py",
    "eval.coverage": "the same",
    "eval.false_alarms": "the same",
    "eval.more": "the run's own settings, each under its name: tests/cli/test_cli_eval.py",
    "eval.device": "where it is computed",
    "eval.plugins": "modules to import",
    "eval.engine.batching": COMPUTED,
    "eval.engine.chunk": COMPUTED,
    "eval.data.root": "where the data lie",
    "eval.data.download": "how they come there",
    "eval.data.fit": "for another domain: tests/cli/test_domains.py",
    "eval.data.invert": "for another domain: tests/cli/test_domains.py",
}
"""Settings that change no figure, and why."""

INERT |= {
    f"data.{name}.{own.name}": "of files that are not here; data.cub has the same settings"
    for name in ("mini_imagenet", "tiered_imagenet", "cifar_fs", "fc100")
    for own in fields(schemas("data")[name])
    if own.name != "name"
}
INERT |= {
    f"data.l2l.{own.name}": "files of learn2learn, not here: tests/components/test_l2l.py"
    for own in fields(schemas("data")["l2l"])
    if own.name != "name"
}
LOOP = {f.name for f in fields(TrainerConfig)} - {"meta_batch", "steps"}
"""Settings of the trainer that the parameters do not depend on: seen in what a run leaves."""


def company(key: str, table: dict[str, Any]) -> Any:
    """The entry for the longest end of a dotted key, or None."""
    ends = [".".join(key.split(".")[i:]) for i in range(key.count(".") + 1)]
    return next((table[end] for end in ends if end in table), None)


def keys_of(prefix: str, schema: type) -> dict[str, Field[Any]]:
    own = [f for f in fields(schema) if f.name != "name" and not is_dataclass(f.default_factory)]
    return {f"{prefix}.{f.name}": f for f in own}


def every_setting() -> dict[str, Field[Any]]:
    """Dotted key with the component's name in it -> field."""
    found: dict[str, Field[Any]] = {}
    for group in GROUPS:
        for name, schema in schemas(group).items():
            if schema.__module__.startswith("metarun."):  # not what other tests have registered
                found |= keys_of(f"{group}.{name}", schema)
    for part, schema in PARTS.items():
        found |= keys_of(part, schema)
    found |= keys_of("task.train", TrainTaskConfig)
    found |= {k: f for k, f in keys_of("train", TrainConfig).items() if _plain(k)}
    found |= {k: f for k, f in keys_of("eval", EvalConfig).items() if _plain(k)}
    evals = {"task": EvalTask, "algo": EvalAlgo, "engine": EvalEngine, "data": EvalData}
    evals["backbone"] = EvalBackbone
    for part, schema in evals.items():
        found |= keys_of(f"eval.{part}", schema)
    return found


def _plain(key: str) -> bool:
    return key.rpartition(".")[2] not in {*DEFAULTS, *PARTS}


SETTINGS = every_setting()


def other(key: str, now: Any) -> Any:
    """Another value that is allowed."""
    if (chosen := company(key, OTHER)) is not None:
        return chosen
    if isinstance(now, bool):
        return not now
    assert isinstance(now, int | float), f"{key}: name another value of it in OTHER"
    return now + 1 if isinstance(now, int) else now / 2 or 0.25


def config_of(changes: Changes) -> TrainConfig:
    """A tiny run with some settings changed."""
    built: dict[str, Any] = {"seed": changes.get("seed", 1), "device": "cpu"}
    for group, default in DEFAULTS.items():
        schema = schemas(group)[changes.get(group, default)]
        built[group] = schema(**_of(group, schema, SMALL | changes))
    for part, schema in PARTS.items():
        built[part] = schema(**_of(part, schema, SMALL | changes))
    built["task"].train = TrainTaskConfig(**_of("task.train", TrainTaskConfig, changes))
    return TrainConfig(**built)


def _of(part: str, schema: type, values: Changes) -> dict[str, Any]:
    return {
        f.name: values[f"{part}.{f.name}"] for f in fields(schema) if f"{part}.{f.name}" in values
    }


def start_of(key: str) -> Changes:
    """The changes of `SMALL` that put a setting into the company in which it matters."""
    group, _, rest = key.partition(".")
    changes: Changes = {}
    if group in DEFAULTS:
        name = rest.partition(".")[0]
        changes[group] = name
        if name == "newton":
            changes["algo"] = "anil"
        if name in ("proto_maml", "unicorn_maml"):  # which tell classes apart
            changes |= IMAGES
        if name == "imaml":
            changes["engine.gradient"] = "implicit"
        if name == "muon":
            changes["algo.adapt"] = ["*.weight"]
    return changes | (company(key, COMPANY) or {})


def typed(key: str) -> str:
    """The key as it is typed, without the component's name."""
    parts = key.split(".")
    return ".".join([parts[0], *parts[2:]]) if parts[0] in DEFAULTS else key.removeprefix("train.")


def changed(key: str) -> tuple[Changes, Changes]:
    """The company of a setting, without and with the setting changed."""
    start, field = start_of(key), SETTINGS[key]
    default = field.default if field.default is not MISSING else None
    now = (SMALL | start).get(typed(key), default)
    return start, start | {typed(key): other(key, now)}


@pytest.fixture(scope="module", autouse=True)
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Noise in the place of drawings, by the names of the real ones."""

    def noise(names: tuple[str, ...], seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(names), 5, 1, 28, 28)
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)

    def draw(seed: int = 0) -> tuple[torch.Tensor, tuple[str, ...]]:
        names = tuple(f"alphabet{a:02}/character{c:02}" for a in range(1, 51) for c in (1, 2))
        return noise(names, seed), names

    written = tuple(omniglot_names())
    drawn = from_equal_classes(noise(written, 0)[:, :, :, ::4, ::4].contiguous(), written)
    here = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 7, 9, 3), np.uint8)
    for number, examples in enumerate(pixels):
        (here / "pictures" / str(number)).mkdir(parents=True)
        for place, example in enumerate(examples):
            Image.fromarray(example).save(here / "pictures" / str(number) / f"{place}.png")
    every = [
        f"{c.group}/{c.name}/{name}" for c in emoji.concepts() for name in emoji.arranged([*SETS])
    ]

    def emojis(root: Path | None, size: int) -> ClassStore:
        rng = np.random.default_rng(0)
        shape = (len(every), 1, 3, size, size)
        return from_equal_classes(torch.from_numpy(rng.integers(0, 256, shape, np.uint8)), every)

    labels = np.repeat(np.arange(10), 4)
    np.savez(here / "features.npz", features=pixels.reshape(40, -1)[:, :6] / 255, labels=labels)
    birds = {
        "100-50-50": {"train": [*"012345"], "val": ["6", "7"], "test": ["8", "9"]},
        "140-30-30": {"train": [*"456789"], "val": ["2", "3"], "test": ["0", "1"]},
    }
    published = cub.published
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cub, "published", lambda s: published(s, ClassList(birds[s], {}), total=40))
        patch.chdir(here)
        patch.setenv("METARUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(emoji, "drawn", emojis)
        patch.setattr(glyphs, "draw", draw)
        patch.setattr(omniglot, "characters", lambda root, *, download: drawn)
        yield


@cache
def _learned(frozen: str) -> dict[str, torch.Tensor]:
    """What two meta-steps learn, and how two tasks are then adapted to."""
    setup = build(config_of(json.loads(frozen)), torch.device("cpu"))
    state = fresh(setup)
    for _ in range(min(2, setup.steps)):  # a control takes none
        meta_step(setup, state)
    with torch.no_grad():
        trace = setup.trace(state.meta, setup.source.sample("val", 0, 2))
    return {n: v.detach() for n, v in state.meta.items()} | trace._asdict()


def learned(changes: Changes) -> dict[str, torch.Tensor]:
    return _learned(json.dumps(changes, sort_keys=True))


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance: Any) -> bool:
    return ours.keys() == theirs.keys() and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, **tolerance)
        for a, b in zip(ours.values(), theirs.values(), strict=True)
    )


def left_by(changes: Changes, folder: Path) -> Any:
    """What a whole run leaves behind: its files, its log, its result; or its error."""
    setup = build(config_of(changes), torch.device("cpu"))
    state = fresh(setup)
    steps = setup.config.trainer.steps
    folder.mkdir()
    try:
        with Tracker(folder, 0, 0, steps) as tracker, Interruption() as stop:
            train(setup, state, folder / "checkpoints", tracker, stop)
            result = finish(setup, state, folder, tracker, stop, {})
    except MetarunError as error:
        return str(error)
    log = [
        {tag: value for tag, value in record.items() if not tag.startswith("time/")}
        for record in read_metrics(folder / "metrics.jsonl")
    ]
    files = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return files, log, result["test"], result["best"]


@pytest.mark.parametrize(
    "key", [k for k in SETTINGS if not k.startswith("eval.") and company(k, INERT) is None]
)
def test_each_setting_changes_what_it_says(key: str, tmp_path: Path) -> None:
    before, after = changed(key)
    part, _, name = key.rpartition(".")
    if part == "trainer" and name in LOOP:
        ends = [left_by(each, tmp_path / str(i)) for i, each in enumerate((before, after))]
        assert ends[0] != ends[1]
    else:
        assert not same(learned(before), learned(after), rtol=0, atol=0)


@pytest.mark.parametrize("key", [k for k in INERT if k.startswith("engine.")])
def test_settings_that_say_how_change_nothing_but_rounding(key: str) -> None:
    before, after = changed(key)
    before["algo.inner_steps"] = after["algo.inner_steps"] = 3
    assert same(learned(before), learned(after), rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    left_by({}, folder)
    return folder


def figures(given: Changes, trained: Path, folder: Path) -> dict[str, Any]:
    """What `metarun eval` finds, or says."""
    parts: dict[str, Any] = {}
    for key, value in given.items():
        part, _, name = key.rpartition(".")
        if part:
            kind = {
                "task": EvalTask,
                "algo": EvalAlgo,
                "backbone": EvalBackbone,
                "engine": EvalEngine,
            }[part]
            parts[part] = kind(**{name: value})
        else:
            parts[name] = value
    folder.mkdir()
    try:
        evaluate(EvalConfig(**({"ckpt": str(trained), "device": "cpu"} | parts)), folder)
    except MetarunError as error:
        return {"error": str(error)}
    written = json.loads((folder / "result.json").read_text())
    return {**written.pop("test", {}), **written.pop("train", {})}


@pytest.mark.parametrize(
    "key",
    [k for k in SETTINGS if k.startswith("eval.") and INERT.get(k, COMPUTED) == COMPUTED],
)
def test_each_setting_of_eval_changes_what_it_says(key: str, trained: Path, tmp_path: Path) -> None:
    own = key.removeprefix("eval.")
    before = figures({}, trained, tmp_path / "before")
    after = figures({own: OTHER[key]}, trained, tmp_path / "after")
    scores = [each.get("mse_per_inner_step") for each in (before, after)]
    if key in INERT:
        assert scores[0] == pytest.approx(scores[1], rel=1e-9)
    else:
        assert scores[0] is not None and scores[0] != scores[1]


def test_eval_of_a_run_is_that_of_its_best_checkpoint(tmp_path: Path) -> None:
    _, _, test, best = left_by({"outer_opt.lr": 3.0}, tmp_path / "run")
    assert best["step"] == 2, "the last model is not to be the best here"
    again = figures({}, tmp_path / "run", tmp_path / "eval")
    assert again["mse_per_task"] == test["mse_per_task"]
    assert json.loads((tmp_path / "eval" / "result.json").read_text())["step"] == 2


def test_no_setting_that_matters_is_neutral(tmp_path: Path) -> None:
    """A run may be resumed with other neutral settings: they change none of its figures."""
    inert = {typed(key) for key in INERT}
    _, _, *figures_before = left_by({}, tmp_path / "before")
    for key in set(NEUTRAL_KEYS) - inert:
        _, _, *figures_after = left_by({key: other(key, None)}, tmp_path / key)
        assert figures_after == figures_before, key


def test_what_is_named_here_exists() -> None:
    ends = {".".join(key.split(".")[i:]) for key in SETTINGS for i in range(key.count(".") + 1)}
    assert {*OTHER, *COMPANY, *INERT} <= ends
