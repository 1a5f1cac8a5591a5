"""Meta-learning online, while one model trains (Grefenstette et al. 2019, algorithm 1)."""

from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.components.algo.base import Algorithm, InnerLoop, OneModel, Problem, Steps
from metarun.components.algo.carried import carried_state
from metarun.components.algo.descent import refuse_mixed
from metarun.components.algo.inner_loop import prepared
from metarun.components.algo.one_model import OneModelConfig, classifier
from metarun.components.algo.weighing import Weighing, by_example, by_network
from metarun.components.backbone.norm import Seen, collecting
from metarun.config.checks import MOST_STEPS, MOST_UNITS, between
from metarun.config.component import builds, settings
from metarun.episodes.examples import Window, Windows
from metarun.unroll import GradientMode, Implicit, Meta, Params, Unrolled, unroll


@settings
class LookAheadConfig(OneModelConfig):
    """Learn how to train one model while it trains, by steps ahead (Grefenstette et al. 2019)."""

    of_training: ClassVar[tuple[str, ...]] = (
        "held_out_batch",
        "ahead",
        "updates",
        "real",
        "weigh",
        "units",
    )

    held_out_batch: int = 128  # held-out examples of a meta-loss
    ahead: int = 1  # steps ahead, after which the meta-loss is taken
    updates: int = 1  # meta-steps before the model goes on
    real: int = 1  # steps that the model then takes
    weigh: Literal["none", "network", "examples"] = "none"  # learned weights of training examples
    units: int = 100  # of the network of algo.weigh=network

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("ahead", "updates", "real"):
            between(f"algo.{key}", getattr(self, key), 1, MOST_STEPS)
        for key in ("held_out_batch", "units"):
            between(f"algo.{key}", getattr(self, key), 1, MOST_UNITS)


@builds(LookAheadConfig)
def look_ahead(problem: Problem, own: LookAheadConfig) -> Algorithm:
    """Learn how to train a model, while it trains.

    A meta-step takes `ahead` steps of the inner optimizer from where the model is, on the training
    batches that come next, and differentiates the loss of held-out examples with respect to what is
    learned. The outer optimizer updates that. After each `updates` meta-steps the model takes
    `real` steps for good, the first of them on the batches of the look-ahead, with what has been
    learned by then. Its parameters and the inner optimizer's state go on; nothing is differentiated
    through the steps that were taken.

    What is learned: hyperparameters of the inner optimizer (`inner_opt.learn`), of all parameters
    or of each (`inner_opt.granularity`), and weights of training examples (`weigh`). The inner loss
    is then mean(vᵢ·ℓᵢ): by `network`, vᵢ is a function of ℓᵢ, which no derivative passes through;
    by `examples`, each training example has a weight of its own. After one step of gradient descent
    with the rate α, the meta-loss L has ∂L/∂vᵢ = −(α/n) ∇L(θ′)·∇ℓᵢ(θ) (Ren et al. 2018,
    section 3). The start is not learned: a training that goes on has it behind it.

    Args:
        problem: a classification of labelled examples; all parameters of the model are trained.
        own: the settings.

    Raises:
        ValueError: nothing is learned, or by a gradient mode that has no derivative of it; the
            inner optimizer's settings change with the number of the inner step; or as `classifier`.
    """
    model, objective, inner = classifier(problem, "look_ahead"), problem.objective, problem.inner
    weights, averages = model.start, model.normalising
    _check(inner, own)
    loop = prepared(inner, weights, Steps(own.ahead, own.ahead))
    moments = carried_state(loop.optimizer, weights)
    weighing = _weighing(problem, own, next(iter(weights.values())))
    if not loop.initial and not weighing.initial:
        raise ValueError(
            "algo=look_ahead has nothing to learn: give 'inner_opt.learn=[lr]' or "
            "algo.weigh=network or examples; algo=supervised is a training without"
        )

    def inner_loss(params: Params, step: int, given: tuple[Params, Window]) -> Tensor:
        learned, window = given
        outputs = model.outputs(params, window.x[step])
        losses = F.cross_entropy(outputs, window.y[step], reduction="none")
        return (weighing.weights(learned, losses.detach(), window.number[step]) * losses).mean()

    def walk(meta: Meta, window: Window, first: int, steps: int, mode: GradientMode) -> Unrolled:
        return unroll(
            lambda params, step, given: inner_loss(params, first + step, given),
            {name: meta[name].detach() for name in weights},
            loop.optimizer,
            steps,
            context=({name: meta[name] for name in weighing.initial}, window),
            hyper=loop.hyper(meta),
            state=moments.state(meta),
            gradient=mode,
        )

    def loss(meta: Meta, window: Window) -> tuple[Tensor, dict[str, Any]]:
        end = walk(meta, window, 0, own.ahead, inner.gradient)
        outputs = model.outputs(end.params, window.held_x)
        value = objective.loss(outputs, window.held_y)
        score = objective.score(outputs, window.held_y)
        return value, {"loss": value, "score": score, "inner_losses": end.losses}

    def advance(meta: Meta, window: Window) -> dict[str, Tensor]:
        now = dict(meta)
        for step in range(own.real):  # one by one, as moving averages follow them
            with torch.no_grad(), collecting() if averages.kept else nullcontext(Seen()) as seen:
                end = walk(now, window, step, 1, "reverse")
            now |= {**end.params, **moments.values(end.state)}
            now |= averages.updated(now, seen) if averages.kept else {}
        return {name: now[name] for name in kept}

    def init() -> dict[str, Tensor]:
        start = {name: value.clone() for name, value in (weights | moments.initial).items()}
        return start | averages.init() | loop.initial | weighing.initial

    def reads(examples: Any) -> Windows:
        return Windows(
            examples,
            size=own.batch_size,
            held_out=own.held_out_batch,
            batches=max(own.ahead, own.real),
            real=own.real,
            updates=own.updates,
        )

    kept = (*weights, *moments.initial, *averages.kept)
    return Algorithm(
        init,
        loss,
        model.trace,
        adapted=tuple(weights),
        kept=kept,
        one_model=OneModel(reads, own.batch_size, advance, own.updates),
    )


def _weighing(problem: Problem, own: LookAheadConfig, like: Tensor) -> Weighing:
    assert problem.examples is not None
    if own.weigh == "network":
        return by_network(own.units, like)
    if own.weigh == "examples":
        return by_example(problem.examples, like)
    return Weighing({}, lambda meta, losses, number: torch.ones_like(losses))


def _check(inner: InnerLoop, own: LookAheadConfig) -> None:
    """Refuse what has no meaning while one model trains, or would never be learned."""
    if inner.schedule is not None:
        raise ValueError(
            "inner_opt.schedule: the inner steps of algo=look_ahead go on through the whole run, "
            "and no inner loop ends; leave it out"
        )
    if inner.learn and "step" in inner.granularity:
        raise ValueError(
            f"inner_opt.granularity={inner.granularity}: the inner steps of algo=look_ahead go on "
            "through the whole run, and each comes once; choose global or parameter"
        )
    if isinstance(inner.gradient, Implicit):
        raise ValueError(
            "engine.gradient=implicit: a few steps ahead do not end at a minimum, as it takes for "
            "granted; choose another engine.gradient"
        )
    if inner.gradient == "first_order" and own.weigh != "none":
        raise ValueError(
            f"engine.gradient=first_order: it has no derivative of the inner loss, so algo.weigh="
            f"{own.weigh} would not be learned; choose reverse, checkpoint or mixed"
        )
    refuse_mixed(inner.gradient, inner)
