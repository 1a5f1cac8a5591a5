"""Model-Agnostic Meta-Learning (Finn, Abbeel and Levine 2017, algorithm 2)."""

from dataclasses import field

from metarun.components.algo.base import (
    Algorithm,
    Problem,
    detached_parameters,
    refuse_frozen,
)
from metarun.components.algo.descent import DescentConfig, Fast, descend
from metarun.components.algo.halves import halves
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import match_names


@settings
class MamlConfig(DescentConfig):
    """MAML (Finn et al. 2017)."""

    adapt: list[str] = field(default_factory=lambda: ["*"])  # patterns over parameter names
    per_step: list[str] = field(default_factory=list)  # patterns: a value a step, not adapted

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_step and not self.inner_steps:
            raise ConfigError("algo.per_step needs inner steps: raise algo.inner_steps")
        if not self.adapt:
            raise ConfigError("algo.adapt is empty: name what the inner loop adapts, e.g. ['*']")


@builds(MamlConfig)
def maml(problem: Problem, own: MamlConfig) -> Algorithm:
    """Learn initial weights from which a few inner steps solve a task.

    `maml(problem, inner_steps=3)` is `maml(problem, MamlConfig(inner_steps=3))`.

    Args:
        problem: model, objective and inner optimizer.
        own: the settings. Of them, `order=2` differentiates through the inner steps (as
            `problem.inner.gradient` says). What matches no pattern of `adapt` is meta-learned and
            shared by all tasks, but for what the model has frozen. `reduction="per_shot"` sums
            the inner loss over classes and averages it over shots, as MAML's reference code does,
            so that its learning rates mean the same here. `outer_reduction="per_shot"` is the same
            of the outer loss: with Q queries and K shots of each of N classes, N·Q/K times the
            mean. By that its clipping (`outer_opt.clip_value=10`) means the same here. What
            matches a pattern of `per_step` is learned with a value for each inner step of
            training, and not adapted: the loss of inner step i takes value i, predictions after
            step i do so as well, and later steps take the last one. For `*.norm.*` these are the γ
            and β of MAML++ (Antoniou, Edwards and Storkey 2019). `multi_step_loss` is theirs, too
            (see `weights_by_step`), and so is `first_order_until`: the meta-gradient is that of
            `order=1` in so many meta-steps. It costs as much as that of `order=2`.

    Raises:
        ValueError: a pattern of `adapt` or of the inner groups matches no parameter or frozen
            ones only, the inner optimizer cannot serve the parameters or the gradient mode, or a
            hyperparameter is to be learned that is unknown or has no gradient in this mode.
    """
    return descend(problem, own, fast_weights(problem, own))


def fast_weights(problem: Problem, own: MamlConfig) -> Fast:
    """The weights of the network that match `adapt`, as what an inner loop adapts.

    Raises:
        ValueError: a pattern matches no parameter or frozen ones only, or nothing is left to adapt.
    """
    model = problem.model
    weights = detached_parameters(model)
    refuse_frozen(model, own.adapt, "algo.adapt")
    refuse_frozen(model, problem.inner.groups, "inner_opt.groups")
    per_step = match_names(weights, own.per_step) if own.per_step else []
    adapted = [name for name in match_names(weights, own.adapt) if name not in per_step]
    if not adapted:
        raise ValueError("algo.per_step leaves nothing to adapt")
    model_halves = halves(model, [*adapted, *per_step], problem.inputs)
    return Fast(
        weights,
        like={name: weights[name] for name in adapted},
        start=lambda meta, support: {name: meta[name] for name in adapted},
        decode=model_halves.decode,
        shared=model_halves.shared,
        encode=model_halves.encode,
        per_step=tuple(per_step),
    )
