"""What is measured: every case of every workload, and which implementations take part."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

METARUN = {
    "metarun": (),
    "metarun-eager": ("engine.compile=none",),
    "metarun-replay": ("engine.compile=replay",),
    "metarun-inductor": ("engine.compile=inductor",),
    "metarun-checkpoint": ("engine.gradient=checkpoint", "engine.compile=replay"),
}
"""Settings of metarun by the name that a table shows. Add a line to measure others."""

PEERS = ("vmap", "higher", "learn2learn", "torchopt")
"""Those of MAML. What else takes part stands at its workload."""

TOLERANCE = 1e-8
"""How far meta-gradients in float64 may be from each other, relative to the largest element."""

ROUGH_TOLERANCE = 1e-3
"""The same where qpth takes part. Its backward pass takes no slack and no multiplier for less than
1e-8. On the tasks of the check its derivative by the features is up to 8e-4 from that of the bounds
that hold, found exactly; metarun's is 2e-8 from it."""

OMNIGLOT_CLASSES = 4400  # of the training split, rotated ones included


@dataclass(frozen=True)
class Case:
    """One row of bars: implementations that do the same.

    Attributes:
        workload: "W1" … "W14", with the variant behind a hyphen if there are several.
        kind: "meta-step", "sampling" or "start-up".
        what: in words.
        overrides: the settings of `metarun train`.
        implementations: who takes part; ratios are to the first one's time.
        check_tasks: tasks in the meta-batch of the gradient check, in float64.
        rough: who has `ROUGH_TOLERANCE`, at the first meta-step alone. Adam makes a whole step of
            an element near 0 whatever its size, so the parameters of later ones differ by more.
    """

    workload: str
    kind: str
    what: str
    overrides: tuple[str, ...] = ()
    inner_steps: int | None = None
    order: int | None = None
    implementations: tuple[str, ...] = ()
    check_tasks: int = 0
    rough: tuple[str, ...] = ()

    def tolerance(self, name: str) -> float:
        """How far an implementation's meta-gradient may be off."""
        return ROUGH_TOLERANCE if name in self.rough else TOLERANCE

    @property
    def label(self) -> str:
        """A short name, unlike that of any other case."""
        steps = "" if self.inner_steps is None else f", {self.inner_steps} inner steps"
        return f"{self.workload}{steps}".replace(" 1 inner steps", " 1 inner step")


def omniglot_folder() -> Path | None:
    """Where the real Omniglot is, if METARUN_DATA says so."""
    root = os.environ.get("METARUN_DATA")
    folder = Path(root or ".") / "omniglot-py"
    return folder if root and folder.is_dir() else None


def all_cases(quick: bool) -> list[Case]:
    """Every case in order; `quick` has the first one of each workload, made small."""
    cases = [*_sinusoid(), *_omniglot(), *_mini_imagenet(), *_anil(), *_sampling()]
    cases += [*_many_steps(), Case("W7", "start-up", "from the command to an answer")]
    cases += [*_first_order(), *_heads(), *_learned_rates(), *_residual()]
    if not quick:
        return cases
    return [_small(case) for case in reversed({c.workload: c for c in cases[::-1]}.values())]


def _sinusoid() -> list[Case]:
    return [
        _meta_steps(
            "W1",
            "sinusoid, MLP 40-40, 25 tasks, 10-shot",
            ("data=sinusoid", "backbone=mlp"),
            steps,
            implementations=(
                "metarun", "metarun-eager", "metarun-inductor", "vmap", "vmap-compiled", *PEERS[1:]
            ),
            check_tasks=25,
        )
        for steps in (1, 5)
    ]  # fmt: skip


def _omniglot() -> list[Case]:
    what, data = _omniglot_data()
    implementations = ("metarun", "metarun-eager", "metarun-replay", "metarun-inductor", *PEERS)
    return [
        _meta_steps("W2", what, data, steps, implementations=implementations) for steps in (1, 5)
    ]


def _mini_imagenet() -> list[Case]:
    return [
        _meta_steps(
            f"W3-5w{shot}s",
            f"84×84×3 random pixels, conv4-32 max-pool, 4 tasks, 5-way {shot}-shot, 15 queries",
            ("data=pixels", "backbone.width=32", "backbone.pool=max", "trainer.meta_batch=4",
             f"task.shot={shot}", "inner_opt.lr=0.01"),
            5,
            implementations=("metarun", "metarun-eager", *PEERS),
            check_tasks=2,
        )
        for shot in (1, 5)
    ]  # fmt: skip


def _anil() -> list[Case]:
    what, data = _omniglot_data()
    return [_meta_steps("W4", f"ANIL: {what}", ("algo=anil", *data), steps) for steps in (1, 5)]


def _sampling() -> list[Case]:
    data, implementations = _omniglot_data()[1], ("metarun", "learn2learn")
    what = "32 training episodes of Omniglot, 5-way 1-shot, 15 queries"
    return [Case("W5", "sampling", what, data, implementations=implementations)]


def _many_steps() -> list[Case]:
    _, data = _omniglot_data()
    return [
        _meta_steps(
            "W6",
            "28×28 images, conv4-32 strided, 4 tasks, 5-way 1-shot, 15 queries",
            (*data, "backbone.width=32", "trainer.meta_batch=4", "inner_opt.lr=0.01"),
            steps,
            implementations=("metarun", "metarun-checkpoint", "higher"),
            check_tasks=1,
        )
        for steps in (1, 5, 20, 50, 100)
    ]


def _first_order() -> list[Case]:
    what, data = _omniglot_data()
    return [
        _meta_steps("W8", f"first order: {what}", data, steps, order=1,
                    implementations=("metarun", "metarun-eager", "metarun-replay", *PEERS))
        for steps in (1, 5)
    ]  # fmt: skip


def _heads() -> list[Case]:
    """ProtoNet, R2D2 and MetaOptNet, whose heads have a closed form."""
    omniglot, characters = _omniglot_images()
    images = {
        "28": (omniglot, characters),
        "84": ("84×84×3 random pixels", ("data=pixels",)),
    }
    heads = {
        "W9": ("ProtoNet", ("algo=protonet",), ("plain", "vmap", "learn2learn", "easyfsl")),
        "W10": ("R2D2", ("algo=r2d2",), ("plain", "vmap")),
        "W11": ("MetaOptNet", ("algo=metaoptnet", "algo.variant=code"),
                ("plain", "vmap", "learn2learn")),
    }  # fmt: skip
    return [
        Case(
            f"{workload}-{side}",
            "meta-step",
            f"{method}: {what}, conv4-64 max-pool, 8 tasks, 5-way 5-shot, 15 queries",
            (*data, *algo, "backbone.pool=max", "task.shot=5", "trainer.meta_batch=8"),
            implementations=("metarun", "metarun-eager", "metarun-replay", *peers),
            check_tasks=2,
            rough=peers if workload == "W11" else (),
        )
        for workload, (method, algo, peers) in heads.items()
        for side, (what, data) in images.items()
    ]


def _learned_rates() -> list[Case]:
    """MAML++ with five steps and Meta-SGD with one, as in their papers."""
    what, data = _omniglot_images()
    shape = "conv4-64 strided, 8 tasks, 5-way 1-shot, 15 queries"
    shared = (*data, "trainer.meta_batch=8")
    own = ("algo=maml_pp", "algo.per_step=[]", "outer_opt.schedule=constant", "inner_opt.lr=0.1")
    return [
        _meta_steps(
            "W12", f"MAML++ with multi-step loss, a rate of each tensor and step: {what}, {shape}",
            (*shared, *own), 5,
            implementations=("metarun", "metarun-eager", "plain", "vmap", "learn2learn",
                             "parallel-metalearn"),
            check_tasks=2,
        ),
        _meta_steps(
            "W13", f"Meta-SGD: {what}, {shape}", (*shared, "algo=meta_sgd"), 1,
            implementations=("metarun", "metarun-eager", "plain", "vmap", "learn2learn"),
            check_tasks=2,
        ),
    ]  # fmt: skip


def _residual() -> list[Case]:
    return [
        _meta_steps(
            "W14",
            "84×84×3 random pixels, ResNet-12, 2 tasks, 5-way 1-shot, 15 queries",
            ("data=pixels", "backbone=resnet12", "trainer.meta_batch=2", "inner_opt.lr=0.01"),
            2,
            implementations=("metarun", "metarun-eager", "higher", "learn2learn"),
            check_tasks=1,
        )
    ]


def _omniglot_data() -> tuple[str, tuple[str, ...]]:
    """Tasks of Omniglot and the strided conv4-64, in words and as settings."""
    what, images = _omniglot_images()
    shared = ("inner_opt.lr=0.4", "trainer.meta_batch=32")
    return f"{what}, conv4-64 strided, 32 tasks, 5-way 1-shot, 15 queries", (*images, *shared)


def _omniglot_images() -> tuple[str, tuple[str, ...]]:
    """In words and as settings; where the files are not there, random pixels of their shape."""
    if omniglot_folder():
        return "Omniglot", ("data=omniglot",)
    random = ("data=pixels", "data.channels=1", "data.side=28", f"data.classes={OMNIGLOT_CLASSES}")
    return "28×28 random pixels", random


def _meta_steps(
    workload: str,
    what: str,
    overrides: tuple[str, ...],
    inner_steps: int,
    order: int = 2,
    implementations: tuple[str, ...] = ("metarun", "metarun-eager", *PEERS),
    check_tasks: int = 4,
) -> Case:
    steps = (f"algo.inner_steps={inner_steps}", f"algo.order={order}")
    return Case(workload, "meta-step", what, (*overrides, *steps), inner_steps, order,
                implementations, check_tasks)  # fmt: skip


def _small(case: Case) -> Case:
    images = case.kind == "meta-step" and "backbone=mlp" not in case.overrides
    width = "backbone.width=8"
    if "backbone=resnet12" in case.overrides:
        width = "backbone.widths=[8,8,8,8]"
    size = ("trainer.meta_batch=2", *((width,) if images else ()))
    return replace(
        case,
        what=f"(quick: 2 tasks, 8 channels) {case.what}" if case.kind == "meta-step" else case.what,
        overrides=tuple(dict((o.partition("=")[0], o) for o in (*case.overrides, *size)).values()),
        check_tasks=min(case.check_tasks, 2),
    )
