"""CAVIA (Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019): adapt a context, not weights."""

from torch import Tensor, nn

from metarun.components.algo.base import Algorithm, Problem, apply_model, detached_parameters
from metarun.components.algo.descent import DescentConfig, Fast, descend
from metarun.config.checks import MOST_UNITS, between
from metarun.config.component import builds, settings
from metarun.unroll import Meta, Params

CONTEXT = "context.values"
WEIGHT, BIAS = "context.weight", "context.bias"


@settings
class CaviaConfig(DescentConfig):
    """CAVIA (Zintgraf et al. 2019): the inner loop adapts a context, and no weights."""

    inner_steps: int = 2  # inner steps in training
    eval_inner_steps: int = 2  # inner steps in validation and test
    contexts: int | None = None  # context parameters; null: 100 that scale features, 5 as inputs
    layer: str | None = None  # where they enter; null: third normalisation, or first linear layer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contexts is not None:
            between("algo.contexts", self.contexts, 1, MOST_UNITS)


@builds(CaviaConfig)
def cavia(problem: Problem, own: CaviaConfig) -> Algorithm:
    """Learn weights that a few context parameters φ specialise; φ is zero before each task.

    Inner steps change φ alone, and the outer loss learns all weights.

    At a linear layer φ is joined to the input: the layer gets Wx + Uφ + b, with U learned, too
    (sinusoids in the paper: 5 parameters at the first layer). At a batch normalisation a learned
    linear map gives (γ, β) = Aφ + a of each channel, and what is normalised becomes γ·h + β (FiLM;
    images in the paper: 100 parameters at the third layer). U and A start as torch starts a linear
    layer; the paper's code has Kaiming's for its convolutions and A.

    `conf/_usual` sets the paper's inner rate of 1 for sgd. The paper takes 2 inner steps for
    images and 1 for sinusoids. Its network for images pools before γ and β enter, and ours after
    that: where a γ is negative, that is another maximum.

    Args:
        problem: model, objective and inner optimizer.
        own: the settings. `layer` is the name of a module, such as "body.2.norm" or "body.0".

    Raises:
        ValueError: there is no such layer, or it is no linear layer or normalisation with gain and
            shift, or they are frozen.
    """
    weights = detached_parameters(problem.model)
    name, layer = _layer(problem.model, own.layer)
    weight, bias = (f"{name}.{part}" if name else part for part in ("weight", "bias"))
    if lacking := [part for part in (weight, bias) if part not in weights]:
        raise ValueError(
            f"algo.layer: {name} has no {lacking[0]} that is learned, which algo=cavia changes by "
            "its context; with backbone.norm_gain=true a normalisation has both"
        )
    scales = not isinstance(layer, nn.Linear)
    count = own.contexts or (100 if scales else 5)
    like = weights[weight]
    initial = {key: value.to(like) for key, value in _maps(count, like, scales).items()}
    modulate = _scaled if scales else _joined

    def decode(params: Meta, x: Tensor) -> Tensor:
        changed = {n: params[n] for n in weights}
        changed[weight], changed[bias] = modulate(params, params[weight], params[bias])
        return apply_model(problem.model, changed, x)

    def start(meta: Meta, support: object) -> Params:
        return {CONTEXT: meta[weight].new_zeros(count)}

    fast = Fast(
        {**weights, **initial},
        like={CONTEXT: like.new_zeros(count)},
        start=start,
        decode=decode,
        shared=(*weights, *initial),
    )
    return descend(problem, own, fast)


def _layer(model: nn.Module, wanted: str | None) -> tuple[str, nn.Module]:
    """The layer that a context enters, with its name."""
    modules = dict(model.named_modules())
    norms = [n for n, m in modules.items() if _normalises(m)]
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
    name = wanted
    if name is None:
        name = norms[:3][-1] if norms else next(iter(linear), None)
    if name is None or name not in [*norms, *linear]:
        raise ValueError(
            f"algo.layer={wanted}: algo=cavia needs a linear layer or a normalisation of channels; "
            f"of the backbone these are: {', '.join([*norms, *linear]) or 'none'}"
        )
    return name, modules[name]


def _normalises(module: nn.Module) -> bool:
    """Whether it scales and shifts channels, by parameters of its own."""
    shift = getattr(module, "bias", None)
    gain = getattr(module, "weight", shift)
    is_vector = isinstance(shift, nn.Parameter) and shift.dim() == 1
    return is_vector and (gain is None or gain.dim() == 1)


def _maps(count: int, like: Tensor, scales: bool) -> dict[str, Tensor]:
    """The learned maps of a context: A and a, or U."""
    if scales:
        film = nn.Linear(count, 2 * len(like))
        return {WEIGHT: film.weight.detach(), BIAS: film.bias.detach()}
    outputs, inputs = like.shape
    joined = nn.Linear(inputs + count, outputs)
    return {WEIGHT: joined.weight.detach()[:, inputs:].clone()}


def _scaled(params: Meta, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """γ·(weight·h + bias) + β, as another weight and bias."""
    gain, shift = ((params[WEIGHT] * params[CONTEXT]).sum(1) + params[BIAS]).chunk(2)
    return gain * weight, gain * bias + shift


def _joined(params: Meta, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What the context adds to a linear layer does not depend on the example: another bias."""
    return weight, bias + (params[WEIGHT] * params[CONTEXT]).sum(1)
