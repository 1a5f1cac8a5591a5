"""Small runs of the whole catalogue: every component, and every choice that a setting has.

They are those of the catalogue's schemas. A component that is new, or a choice that a setting has
gained, is among them by itself.
"""

from collections.abc import Iterator
from dataclasses import fields

from metarun.config.augment import AugmentConfig
from metarun.config.catalogue import schemas
from metarun.config.component import choices_of
from metarun.config.run import EngineConfig
from tests.components.test_every_algorithm import of_algorithm
from tests.components.test_every_backbone import SIZES

MLP = ("backbone=mlp", "backbone.hidden=[4]")
SMALL = ("task.way=3", "task.shot=2", "task.query=2", "trainer.meta_batch=2", "trainer.steps=9")
GLYPHS = ("data=glyphs", *SMALL)
SINE = ("data=sinusoid", *MLP, "task.shot=4", "task.query=3", *SMALL[3:])
ONE_BY_ONE = "engine.compile=none"
REPLAY = "engine.compile=replay"
TRIED_WITH = {"algo": "maml", "inner_opt": "sgd", "outer_opt": "adam", "backbone": "conv4"}
"""Where a setting that several components of a group have is tried."""

NEEDED: dict[str, tuple[str, ...]] = {  # for a choice to mean something, or to be allowed
    "inner_opt.granularity": ("inner_opt.learn=[lr]",),
    "inner_opt.schedule": ("inner_opt.learn=[lr]",),
    "inner_opt=muon": ("algo.adapt=['*.weight']",),  # matrices alone
    "inner_opt=newton": ("algo=anil",),  # few parameters
    "inner_opt.nesterov=true": ("inner_opt.momentum=0.9",),
    "outer_opt.nesterov=true": ("outer_opt.momentum=0.9",),
    "data=multi": ("data.sources=[{name: glyphs}, {name: glyphs}]",),
    "backbone.order": ("backbone.pool=max",),
    "algo=reptile loop": ("algo.inner_batch=2",),
    "algo=baseline loop": ("algo.inner_batch=2",),
    "engine.solver": ("engine.gradient=implicit",),
    "engine.gradient=implicit": ("engine.solver_steps=2",),
    "engine.gradient=evolution": ("engine.samples=2",),
}

EXCLUDED = {
    "engine.compile=inductor": "inductor makes no kernels for a device that is not there",
    "engine.precision=tf32": "it is refused where torch.cuda is not what computes",
}
"""Choices that are not tried, and why."""


def cases() -> dict[str, tuple[str, ...]]:
    """The settings of each case by its name."""
    return dict(
        pair
        for group in (_algorithms, _inner_optimizers, _outer_optimizers, _networks, _data, _engine)
        for pair in group()
    )


def _algorithms() -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, schema in schemas("algo").items():
        given = tuple(of_algorithm(name, "mlp"))
        yield f"algo={name} recorded", (*given, REPLAY)
        looped = (*of_algorithm(name), ONE_BY_ONE, "engine.batching=loop")
        yield f"algo={name} loop", (*looped, *NEEDED.get(f"algo={name} loop", ()))
        for choice in choices("algo", name, schema):
            yield f"algo={name} {choice}", (*given, ONE_BY_ONE, *needed(choice), choice)
    latent = (*of_algorithm("cnp"), ONE_BY_ONE, "algo.latent=2", "algo.samples=2")
    yield "algo=cnp with a latent variable", latent


def _inner_optimizers() -> Iterator[tuple[str, tuple[str, ...]]]:
    steps = ("algo.inner_steps=2", "algo.eval_inner_steps=2", ONE_BY_ONE)
    for name, schema in schemas("inner_opt").items():
        known = {field.name for field in fields(schema)}
        more = tuple(f"inner_opt.{k}=1" for k in ("clip_norm", "clip_value") if k in known)
        learn = ("inner_opt.learn=[lr]",) if "lr" in known else ()
        given = (*GLYPHS, *MLP, *steps, f"inner_opt={name}", *NEEDED.get(f"inner_opt={name}", ()))
        yield f"inner_opt={name}", (*given, *learn, *more)
        for choice in choices("inner_opt", name, schema):
            yield f"inner_opt={name} {choice}", (*given, *needed(choice), choice)


def _outer_optimizers() -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, schema in schemas("outer_opt").items():
        given = (*SINE, ONE_BY_ONE, f"outer_opt={name}")
        clipped = ("outer_opt.clip_norm=1", "outer_opt.clip_value=1", "outer_opt.weight_decay=0.1")
        yield f"outer_opt={name}", (*given, *clipped)
        for choice in choices("outer_opt", name, schema):
            yield f"outer_opt={name} {choice}", (*given, *needed(choice), choice)


def _networks() -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, schema in schemas("backbone").items():
        algo = "r2d2" if name == "identity" else "protonet"
        given = (*GLYPHS, f"algo={algo}", f"backbone={name}", *SIZES.get(name, ()), ONE_BY_ONE)
        yield f"backbone={name}", given
        for choice in choices("backbone", name, schema):
            yield f"backbone={name} {choice}", (*given, *needed(choice), choice)


def _data() -> Iterator[tuple[str, tuple[str, ...]]]:
    for name in schemas("data"):
        if name == "lake":  # nothing is trained on it
            yield f"data={name}", (*GLYPHS, "algo=protonet", *MLP, ONE_BY_ONE, "task.way=20")
            continue
        regresses = "curves" in name or name in ("sinusoid", "sinusoid_line", "harmonic")
        one = name.endswith("_examples")
        algo = "look_ahead" if one else "maml" if regresses else "protonet"
        shape = SMALL[1:] if regresses else () if one else SMALL
        own = ("inner_opt.learn=[lr]", "algo.batch_size=4", "trainer.steps=9") if one else ()
        own += NEEDED.get(f"data={name}", ())
        yield f"data={name}", (f"data={name}", f"algo={algo}", *MLP, *shape, *own, ONE_BY_ONE)
    proto = ("algo=protonet", *MLP, ONE_BY_ONE)
    yield "classes in another order", (*GLYPHS, *proto)
    yield "images on the CPU", (*GLYPHS, *proto)
    yield "task.within=group", (*GLYPHS, *proto, "task.within=group")
    yield "task.train.way=2", (*GLYPHS, *proto, "task.train.way=2")
    yield "task.min_way=2", (*GLYPHS, *proto, "task.min_way=2", "task.min_shot=1")
    yield "task.imbalanced=true", (*GLYPHS, *proto, "task.imbalanced=true")
    numbers = {"crop": 2, "scale": "[0.8,1.2]"}
    changes = [f.name for f in fields(AugmentConfig) if f.name not in ("support", "query")]
    augment = [f"augment.{change}={numbers.get(change, 0.3)}" for change in changes]
    yield "augment", ("data=cifar_fs", *SMALL, *proto, *augment)
    yield "augment recorded", ("data=cifar_fs", *SMALL, *proto, REPLAY, *augment)
    batches = ("algo=baseline", *MLP, "algo.eval_inner_steps=2", ONE_BY_ONE)
    yield "augment of batches", ("data=cifar_fs", *SMALL, *batches, *augment)


def _engine() -> Iterator[tuple[str, tuple[str, ...]]]:
    for choice in choices("engine", "", EngineConfig):
        if choice in EXCLUDED:
            continue
        maps = ("backbone=conv4", "backbone.width=2")
        for network in (MLP, maps) if choice.startswith("engine.gradient") else (MLP,):
            given = (*GLYPHS, *network, "algo.inner_steps=2", "algo.eval_inner_steps=2")
            own = (ONE_BY_ONE,) if not choice.startswith("engine.compile") else ()
            kind = network[0].removeprefix("backbone=")
            yield f"{choice} {kind}", (*given, *own, *needed(choice), choice)
    more = ("algo.inner_steps=2", "algo.eval_inner_steps=2")
    yield "recordings compared", (*SINE, REPLAY)
    yield "steps recorded", (*SINE, *more, "engine.gradient=checkpoint", REPLAY)
    yield "chunks", (*SINE, "engine.chunk=1", REPLAY)
    yield "trainer.nonfinite=skip", (*SINE, "trainer.nonfinite=skip", ONE_BY_ONE)


def needed(choice: str) -> tuple[str, ...]:
    """What goes with a choice."""
    return (*NEEDED.get(choice.partition("=")[0], ()), *NEEDED.get(choice, ()))


def choices(group: str, name: str, schema: type) -> Iterator[str]:
    """`group.setting=value` for all values but the default, of settings that have a few.

    A setting that several components of a group have is tried with one of them.
    """
    others = [kind for other, kind in schemas(group).items() if other != name] if name else []
    shared = {field.name for kind in others for field in fields(kind)}
    one = TRIED_WITH.get(group, "")
    of_that = {field.name for field in fields(schemas(group)[one])} if one else set()
    for field in fields(schema):
        if name != one and field.name in shared & of_that:
            continue
        known = (True, False) if field.type is bool else choices_of(schema).get(field.name, ())
        for value in known:
            if value != field.default:
                shown = str(value).lower() if field.type is bool else value
                yield f"{group}.{field.name}={shown}"
