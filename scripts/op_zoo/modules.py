"""Modules, losses and points where torch's derivatives are known to be delicate, as cases."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations as pz

from op_zoo.measure import Case, Params, of_module

Make = Callable[[], Case]


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape)


class _Pick(nn.Module):
    """A layer with parameters before and after what has none."""

    def __init__(self, *middle: nn.Module, width: int = 6, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.middle = nn.Sequential(*middle)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.middle(x.reshape(x.shape[0], *self.shape) if self.shape else x)


class _Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _tokens(*shape: int) -> Tensor:
    return torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(0))


def _after(*middle: nn.Module, width: int = 6, shape: tuple[int, ...] = ()) -> Make:
    return lambda: of_module(_Pick(*middle, width=width, shape=shape).double(), _x(3, 4))


def _layer(make: Callable[[], nn.Module], *shape: int, pick: Any = lambda out: out) -> Make:
    return lambda: of_module(make(), _x(*shape), loss=pick)


def _loss(fn: Callable[[Tensor], Any], outputs: int = 4) -> Make:
    return lambda: of_module(nn.Linear(3, outputs), _x(5, 3), loss=fn)


def _at(fn: Callable[[Tensor], Any], *values: Any) -> Make:
    def make() -> Case:
        params: Params = {f"w{i}": torch.as_tensor(v).double() for i, v in enumerate(values)}
        return Case(lambda given: fn(*given.values()), params)

    return make


def _gram(w: Tensor) -> Tensor:
    return torch.eye(len(w)) + w @ w.mT


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    name: getattr(nn, name)
    for name in [
        "ReLU",
        "ReLU6",
        "ELU",
        "SELU",
        "CELU",
        "GELU",
        "SiLU",
        "Mish",
        "Tanh",
        "Sigmoid",
        "Softplus",
        "Softsign",
        "Hardtanh",
        "Hardswish",
        "Hardsigmoid",
        "Hardshrink",
        "Softshrink",
        "Tanhshrink",
        "LogSigmoid",
        "LeakyReLU",
        "PReLU",
        "RReLU",
    ]
} | {
    "GELU (tanh)": lambda: nn.GELU("tanh"),
    "Threshold": lambda: nn.Threshold(0.1, 0.2),
    "Softmax": lambda: nn.Softmax(-1),
    "Softmin": lambda: nn.Softmin(-1),
    "LogSoftmax": lambda: nn.LogSoftmax(-1),
    "GLU": nn.GLU,
    "Dropout": lambda: nn.Dropout(0.3),
    "AlphaDropout": lambda: nn.AlphaDropout(0.3),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.3),
}
NORMS: dict[str, Make] = {
    "LayerNorm": _after(nn.LayerNorm(6)),
    "LayerNorm (no affine)": _after(nn.LayerNorm(6, elementwise_affine=False)),
    "LayerNorm (two dimensions)": _after(nn.LayerNorm((2, 3)), shape=(2, 3)),
    "RMSNorm": _after(nn.RMSNorm(6)),
    "GroupNorm": _after(nn.GroupNorm(2, 4), width=12, shape=(4, 3)),
    "BatchNorm1d": _after(nn.BatchNorm1d(6, track_running_stats=False)),
    "BatchNorm2d": _after(nn.BatchNorm2d(2, track_running_stats=False), width=12, shape=(2, 2, 3)),
    "BatchNorm1d (eval)": lambda: of_module(_Pick(nn.BatchNorm1d(6)).eval(), _x(3, 4)),
    "InstanceNorm1d": _after(nn.InstanceNorm1d(2, affine=True), shape=(2, 3)),
    "InstanceNorm2d": _after(nn.InstanceNorm2d(2), width=12, shape=(2, 2, 3)),
    "LocalResponseNorm": _after(nn.LocalResponseNorm(2), shape=(2, 3)),
    "CrossMapLRN2d": _after(nn.CrossMapLRN2d(2), width=12, shape=(2, 2, 3)),
}
LAYERS: dict[str, Make] = {
    "Linear": _layer(lambda: nn.Linear(4, 3), 5, 4),
    "Bilinear": lambda: of_module(nn.Bilinear(3, 4, 2), _x(5, 3), _x(5, 4)),
    "Conv1d": _layer(lambda: nn.Conv1d(2, 3, 3, padding=1), 2, 2, 5),
    "Conv2d": _layer(lambda: nn.Conv2d(2, 3, 3, stride=2), 2, 2, 5, 5),
    "Conv2d (grouped)": _layer(lambda: nn.Conv2d(4, 4, 3, groups=2), 2, 4, 4, 4),
    "Conv2d (dilated)": _layer(lambda: nn.Conv2d(2, 2, 2, dilation=2), 2, 2, 5, 5),
    "Conv2d (circular)": _layer(
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), 2, 2, 4, 4
    ),
    "Conv3d": _layer(lambda: nn.Conv3d(1, 2, 2), 2, 1, 3, 3, 3),
    "ConvTranspose1d": _layer(lambda: nn.ConvTranspose1d(2, 3, 3), 2, 2, 4),
    "ConvTranspose2d": _layer(lambda: nn.ConvTranspose2d(2, 2, 3, stride=2), 1, 2, 3, 3),
    "ConvTranspose3d": _layer(lambda: nn.ConvTranspose3d(1, 2, 2), 1, 1, 2, 2, 2),
    "Embedding": lambda: of_module(nn.Embedding(5, 3), _tokens(4)),
    "Embedding (padding)": lambda: of_module(nn.Embedding(5, 3, padding_idx=0), _tokens(4)),
    "Embedding (max_norm)": lambda: of_module(nn.Embedding(5, 3, max_norm=1.0), _tokens(4)),
    "Embedding (sparse)": lambda: of_module(nn.Embedding(5, 3, sparse=True), _tokens(4)),
    "EmbeddingBag": lambda: of_module(nn.EmbeddingBag(5, 3), _tokens(3, 4)),
    "EmbeddingBag (sum)": lambda: of_module(nn.EmbeddingBag(5, 3, mode="sum"), _tokens(3, 4)),
    "EmbeddingBag (max)": lambda: of_module(nn.EmbeddingBag(5, 3, mode="max"), _tokens(3, 4)),
    "RNN": _layer(lambda: nn.RNN(3, 2), 4, 2, 3, pick=lambda out: out[0]),
    "RNN (relu, 2 layers)": _layer(
        lambda: nn.RNN(3, 2, 2, nonlinearity="relu"), 4, 2, 3, pick=lambda out: out[0]
    ),
    "GRU": _layer(lambda: nn.GRU(3, 2), 4, 2, 3, pick=lambda out: out[0]),
    "GRU (both ways)": _layer(
        lambda: nn.GRU(3, 2, bidirectional=True), 4, 2, 3, pick=lambda out: out[0]
    ),
    "LSTM": _layer(lambda: nn.LSTM(3, 2), 4, 2, 3, pick=lambda out: out[0]),
    "LSTM (projected)": _layer(
        lambda: nn.LSTM(3, 3, proj_size=2), 4, 2, 3, pick=lambda out: out[0]
    ),
    "RNNCell": _layer(lambda: nn.RNNCell(3, 2), 4, 3),
    "GRUCell": _layer(lambda: nn.GRUCell(3, 2), 4, 3),
    "LSTMCell": _layer(lambda: nn.LSTMCell(3, 2), 4, 3),
    "MultiheadAttention": _layer(_Attention, 2, 3, 4),
    "MultiheadAttention (bias_kv)": _layer(lambda: _Attention(add_bias_kv=True), 2, 3, 4),
    "MultiheadAttention (dropout)": _layer(lambda: _Attention(dropout=0.2), 2, 3, 4),
    "scaled_dot_product_attention": _layer(
        lambda: nn.Linear(4, 12),
        2,
        3,
        4,
        pick=lambda out: F.scaled_dot_product_attention(*out[:, None].chunk(3, -1)),
    ),
    "scaled_dot_product_attention (causal)": _layer(
        lambda: nn.Linear(4, 12),
        2,
        3,
        4,
        pick=lambda out: F.scaled_dot_product_attention(*out[:, None].chunk(3, -1), is_causal=True),
    ),
    "TransformerEncoderLayer": _layer(
        lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), 2, 3, 4
    ),
    "TransformerEncoderLayer (dropout)": _layer(
        lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, norm_first=True), 2, 3, 4
    ),
    "TransformerDecoderLayer": lambda: of_module(
        nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0), _x(2, 3, 4), _x(2, 3, 4)
    ),
    "MaxPool1d": _after(nn.MaxPool1d(2), shape=(2, 3)),
    "MaxPool2d": _after(nn.MaxPool2d(2), width=16, shape=(1, 4, 4)),
    "MaxPool3d": _after(nn.MaxPool3d(2), width=8, shape=(1, 2, 2, 2)),
    "AvgPool1d": _after(nn.AvgPool1d(2), shape=(2, 3)),
    "AvgPool2d": _after(nn.AvgPool2d(2), width=16, shape=(1, 4, 4)),
    "AvgPool3d": _after(nn.AvgPool3d(2), width=8, shape=(1, 2, 2, 2)),
    "LPPool1d": _after(nn.LPPool1d(3, 2), shape=(2, 3)),
    "LPPool2d": _after(nn.LPPool2d(2, 2), width=16, shape=(1, 4, 4)),
    "AdaptiveAvgPool2d": _after(nn.AdaptiveAvgPool2d(2), width=9, shape=(1, 3, 3)),
    "AdaptiveMaxPool1d": _after(nn.AdaptiveMaxPool1d(2), shape=(2, 3)),
    "AdaptiveMaxPool2d": _after(nn.AdaptiveMaxPool2d(2), width=9, shape=(1, 3, 3)),
    "FractionalMaxPool2d": _after(
        nn.FractionalMaxPool2d(2, output_size=2), width=16, shape=(1, 4, 4)
    ),
    "Upsample (nearest)": _after(nn.Upsample(scale_factor=2), width=4, shape=(1, 2, 2)),
    "Upsample (bilinear)": _after(
        nn.Upsample(scale_factor=2, mode="bilinear"), width=4, shape=(1, 2, 2)
    ),
    "Upsample (bicubic)": _after(
        nn.Upsample(scale_factor=2, mode="bicubic"), width=4, shape=(1, 2, 2)
    ),
    "PixelShuffle": _after(nn.PixelShuffle(2), width=16, shape=(4, 2, 2)),
    "Fold and unfold": _after(nn.Unfold(2), nn.Fold((3, 3), 2), width=9, shape=(1, 3, 3)),
    "ReflectionPad2d": _after(nn.ReflectionPad2d(1), width=9, shape=(1, 3, 3)),
    "ReplicationPad2d": _after(nn.ReplicationPad2d(1), width=9, shape=(1, 3, 3)),
    "CircularPad1d": _after(nn.CircularPad1d(1), shape=(2, 3)),
    "ChannelShuffle": _after(nn.ChannelShuffle(2), width=16, shape=(4, 2, 2)),
    "CosineSimilarity": lambda: of_module(
        nn.Linear(4, 3), _x(5, 4), loss=lambda out: nn.CosineSimilarity()(out, out.flip(0))
    ),
    "PairwiseDistance": lambda: of_module(
        nn.Linear(4, 3), _x(5, 4), loss=lambda out: nn.PairwiseDistance()(out, out.roll(1, 0))
    ),
    "grid_sample": _after(nn.Sigmoid(), width=8, shape=(2, 2, 2)),
    "AdaptiveLogSoftmaxWithLoss": lambda: of_module(
        nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4]),
        _x(5, 4),
        torch.tensor([0, 1, 2, 3, 5]),
        loss=lambda out: out.loss,
    ),
}
LAYERS["grid_sample"] = _layer(
    lambda: nn.Linear(4, 8),
    2, 4,
    pick=lambda out: F.grid_sample(
        torch.arange(18.0).reshape(2, 1, 3, 3).sin(), out.tanh().view(2, 2, 2, 2),
        align_corners=False,
    ),
)  # fmt: skip


def _normed(make: Callable[[], nn.Module], *shape: int) -> Make:
    return _layer(make, *shape)


def _hooked(layer: nn.Module, **options: Any) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer, **options)


PARAMETRIZED: dict[str, Make] = {
    "weight_norm of Linear": _normed(lambda: pz.weight_norm(nn.Linear(4, 3)), 5, 4),
    "weight_norm of Linear (dim=1)": _normed(lambda: pz.weight_norm(nn.Linear(4, 3), dim=1), 5, 4),
    "weight_norm of Linear (dim=-1)": _normed(
        lambda: pz.weight_norm(nn.Linear(4, 3), dim=-1), 5, 4
    ),
    "weight_norm of Linear (dim=None)": _normed(
        lambda: pz.weight_norm(nn.Linear(4, 3), dim=None), 5, 4
    ),
    "weight_norm of Conv2d": _normed(lambda: pz.weight_norm(nn.Conv2d(2, 3, 2)), 2, 2, 3, 3),
    "weight_norm of Conv2d (dim=1)": _normed(
        lambda: pz.weight_norm(nn.Conv2d(2, 3, 2), dim=1), 2, 2, 3, 3
    ),
    "weight_norm of ConvTranspose2d": _normed(
        lambda: pz.weight_norm(nn.ConvTranspose2d(2, 3, 2), dim=1), 2, 2, 3, 3
    ),
    "weight_norm, by hooks": _normed(lambda: _hooked(nn.Linear(4, 3)), 5, 4),
    "weight_norm, by hooks (dim=1)": _normed(lambda: _hooked(nn.Linear(4, 3), dim=1), 5, 4),
    "weight_norm, by hooks (dim=None)": _normed(lambda: _hooked(nn.Linear(4, 3), dim=None), 5, 4),
    "spectral_norm (eval)": _normed(lambda: pz.spectral_norm(nn.Linear(4, 3)).eval(), 5, 4),
    "orthogonal": _normed(lambda: pz.orthogonal(nn.Linear(3, 3)), 5, 3),
    "orthogonal (cayley)": _normed(
        lambda: pz.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"), 5, 3
    ),
    "orthogonal (householder)": _normed(
        lambda: pz.orthogonal(nn.Linear(4, 3), orthogonal_map="householder"), 5, 4
    ),
}


def _log_probabilities(z: Tensor) -> Tensor:
    return z.reshape(5, 1, 4).log_softmax(-1)


_CLASSES = torch.tensor([0, 3, 1, 1, 2])
LOSSES: dict[str, Make] = {
    "mse_loss": _loss(lambda z: F.mse_loss(z, z.new_ones(5, 4))),
    "mse_loss (weight)": _loss(lambda z: F.mse_loss(z, z.new_ones(5, 4), reduction="sum")),
    "l1_loss": _loss(lambda z: F.l1_loss(z, z.new_ones(5, 4))),
    "smooth_l1_loss": _loss(lambda z: F.smooth_l1_loss(z, z.new_ones(5, 4))),
    "huber_loss": _loss(lambda z: F.huber_loss(z, z.new_ones(5, 4))),
    "cross_entropy": _loss(lambda z: F.cross_entropy(z, _CLASSES)),
    "cross_entropy (label smoothing)": _loss(
        lambda z: F.cross_entropy(z, _CLASSES, label_smoothing=0.1)
    ),
    "cross_entropy (weight)": _loss(
        lambda z: F.cross_entropy(z, _CLASSES, weight=torch.arange(1.0, 5.0))
    ),
    "cross_entropy (probabilities)": _loss(lambda z: F.cross_entropy(z, torch.full((5, 4), 0.25))),
    "nll_loss": _loss(lambda z: F.nll_loss(z.log_softmax(-1), _CLASSES)),
    "nll_loss (2d)": _loss(
        lambda z: F.nll_loss(z.reshape(1, 4, 5, 1).log_softmax(1), _CLASSES.reshape(1, 5, 1))
    ),
    "binary_cross_entropy": _loss(lambda z: F.binary_cross_entropy(z.sigmoid(), z.new_ones(5, 4))),
    "binary_cross_entropy_with_logits": _loss(
        lambda z: F.binary_cross_entropy_with_logits(z, z.new_ones(5, 4))
    ),
    "binary_cross_entropy_with_logits (pos_weight)": _loss(
        lambda z: F.binary_cross_entropy_with_logits(
            z, z.new_full((5, 4), 0.3), pos_weight=torch.arange(1.0, 5.0)
        )
    ),
    "kl_div": _loss(lambda z: F.kl_div(z.log_softmax(-1), z.new_full((5, 4), 0.25))),
    "kl_div (log target)": _loss(
        lambda z: F.kl_div(z.log_softmax(-1), z.flip(0).log_softmax(-1), log_target=True)
    ),
    "poisson_nll_loss": _loss(lambda z: F.poisson_nll_loss(z, z.new_ones(5, 4))),
    "gaussian_nll_loss": _loss(lambda z: F.gaussian_nll_loss(z, z.new_ones(5, 4), z.flip(0).exp())),
    "hinge_embedding_loss": _loss(
        lambda z: F.hinge_embedding_loss(z, (2 * (torch.arange(20) % 2) - 1).reshape(5, 4))
    ),
    "margin_ranking_loss": _loss(
        lambda z: F.margin_ranking_loss(z, z.flip(0), torch.ones(5, 4), margin=0.5)
    ),
    "soft_margin_loss": _loss(lambda z: F.soft_margin_loss(z, z.new_ones(5, 4))),
    "multilabel_soft_margin_loss": _loss(
        lambda z: F.multilabel_soft_margin_loss(z, z.new_ones(5, 4))
    ),
    "multilabel_margin_loss": _loss(
        lambda z: F.multilabel_margin_loss(z, torch.tensor([[1, 0, -1, -1]] * 5))
    ),
    "multi_margin_loss": _loss(lambda z: F.multi_margin_loss(z, _CLASSES)),
    "cosine_embedding_loss": _loss(lambda z: F.cosine_embedding_loss(z, z.flip(0), torch.ones(5))),
    "triplet_margin_loss": _loss(lambda z: F.triplet_margin_loss(z, z.roll(1, 0), z.roll(2, 0))),
    "triplet_margin_with_distance_loss": _loss(
        lambda z: F.triplet_margin_with_distance_loss(z, z.roll(1, 0), z.roll(2, 0))
    ),
    "ctc_loss": _loss(
        lambda z: F.ctc_loss(
            _log_probabilities(z), torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2])
        )
    ),
    "linear_cross_entropy of a prototype": _loss(
        lambda z: F.cross_entropy(-torch.cdist(z, z[:3]), torch.tensor([0, 1, 2, 0, 1]))
    ),
    "squared distances to prototypes": _loss(
        lambda z: F.cross_entropy(
            -(z[:, None] - z[None, :3]).pow(2).sum(-1), torch.tensor([0, 1, 2, 0, 1])
        )
    ),
    "normalize": _loss(lambda z: F.normalize(z, dim=-1)),
    "contrastive": _loss(
        lambda z: F.cross_entropy(F.normalize(z) @ F.normalize(z).T / 0.5, torch.arange(5))
    ),
    "ridge head by solve": _loss(
        lambda z: torch.linalg.solve(z.T @ z + torch.eye(4), z.T @ torch.ones(5))
    ),
    "ridge head by inv": _loss(
        lambda z: torch.linalg.inv(z.T @ z + torch.eye(4)) @ (z.T @ torch.ones(5))
    ),
    "ridge head by cholesky_solve": _loss(
        lambda z: torch.cholesky_solve(
            z.T @ torch.ones(5, 1), torch.linalg.cholesky(z.T @ z + torch.eye(4))
        )
    ),
    "ridge head by lstsq": _loss(lambda z: torch.linalg.lstsq(z, torch.ones(5, 1)).solution),
    "ridge head by pinv": _loss(lambda z: torch.linalg.pinv(z) @ torch.ones(5)),
    "marginal likelihood of a Gaussian process": _loss(
        lambda z: torch.logdet(_gram(z)) + torch.linalg.solve(_gram(z), torch.ones(5)).sum()
    ),
    "marginal likelihood by cholesky": _loss(
        lambda z: (
            torch.linalg.cholesky(_gram(z)).diagonal().log().sum()
            + torch.cholesky_solve(torch.ones(5, 1), torch.linalg.cholesky(_gram(z))).sum()
        )
    ),
    "cholesky_inverse": _loss(
        lambda z: torch.cholesky_inverse(torch.linalg.cholesky(_gram(z))) @ torch.ones(5)
    ),
    "multivariate normal": _loss(
        lambda z: torch.distributions.MultivariateNormal(
            z[0], _gram(z.T), validate_args=False
        ).log_prob(z)
    ),
    "lowrank normal": _loss(
        lambda z: torch.distributions.LowRankMultivariateNormal(
            z[0], z.T[:, :2], z[1].exp(), validate_args=False
        ).log_prob(z)
    ),
    "gamma": _loss(
        lambda z: torch.distributions.Gamma(z.exp(), z.flip(0).exp()).log_prob(1 + z**2)
    ),
    "beta": _loss(
        lambda z: torch.distributions.Beta(z.exp(), z.flip(0).exp()).log_prob(z.sigmoid())
    ),
    "dirichlet": _loss(lambda z: torch.distributions.Dirichlet(z.exp()).log_prob(z.softmax(-1))),
    "student t": _loss(lambda z: torch.distributions.StudentT(z.exp()).log_prob(z)),
    "von mises": _loss(
        lambda z: torch.distributions.VonMises(z, z.exp(), validate_args=False).log_prob(z.flip(0))
    ),
    "kl of normals": _loss(
        lambda z: torch.distributions.kl_divergence(
            torch.distributions.Normal(z, z.exp()), torch.distributions.Normal(0.0, 1.0)
        )
    ),
    "gumbel softmax": _loss(lambda z: F.gumbel_softmax(z)),
}
POINTS: dict[str, Make] = {
    "det at the identity": _at(lambda w: torch.linalg.det(torch.eye(2) + w), torch.zeros(2, 2)),
    "det of rank n-1": _at(torch.linalg.det, [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [1.0, 0.0, 1.0]]),
    "det of rank n-2": _at(torch.linalg.det, [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 6.0, 9.0]]),
    "det of zero": _at(lambda w: torch.linalg.det(w) + w.sum(), torch.zeros(3, 3)),
    "logdet at the identity": _at(lambda w: torch.logdet(torch.eye(3) + w), torch.zeros(3, 3)),
    "slogdet at the identity": _at(
        lambda w: torch.linalg.slogdet(torch.eye(3) + w)[1], torch.zeros(3, 3)
    ),
    "inv at the identity": _at(lambda w: torch.linalg.inv(torch.eye(3) + w), torch.zeros(3, 3)),
    "matrix_exp at zero": _at(torch.linalg.matrix_exp, torch.zeros(3, 3)),
    "matrix_exp": _at(torch.linalg.matrix_exp, [[0.3, -0.2], [0.5, 0.1]]),
    "matrix_power": _at(lambda w: torch.linalg.matrix_power(w, 3), torch.zeros(3, 3)),
    "cholesky at the identity": _at(lambda w: torch.linalg.cholesky(_gram(w)), torch.zeros(3, 3)),
    "eigvalsh, sum of squares, repeated": _at(
        lambda w: torch.linalg.eigvalsh(torch.eye(3) + w + w.mT).square().sum(), torch.zeros(3, 3)
    ),
    "eigh, sum of logarithms, repeated": _at(
        lambda w: torch.linalg.eigh(torch.eye(3) + w + w.mT)[0].log().sum(), torch.zeros(3, 3)
    ),
    "eigh, square root of a matrix, repeated": _at(
        lambda w: _root(torch.eye(3) + w + w.mT), torch.zeros(3, 3)
    ),
    "svdvals, sum of squares, repeated": _at(
        lambda w: torch.linalg.svdvals(torch.eye(3) + w).square().sum(), torch.zeros(3, 3)
    ),
    "svdvals, log, repeated": _at(
        lambda w: torch.linalg.svdvals(torch.eye(3) + w).log().sum(), torch.zeros(3, 3)
    ),
    "svd, polar factor, repeated": _at(lambda w: _polar(torch.eye(3) + w), torch.zeros(3, 3)),
    "nuclear norm, repeated": _at(
        lambda w: torch.linalg.matrix_norm(torch.eye(3) + w, "nuc"), torch.zeros(3, 3)
    ),
    "pinv at the identity": _at(lambda w: torch.linalg.pinv(torch.eye(3) + w), torch.zeros(3, 3)),
    "qr at the identity": _at(lambda w: torch.linalg.qr(torch.eye(3) + w)[1], torch.zeros(3, 3)),
    "norm at zero, squared": _at(lambda w: torch.linalg.vector_norm(w).square(), torch.zeros(3)),
    "norm at zero, cubed": _at(
        lambda w: torch.linalg.vector_norm(w).pow(4) + w.sum(), torch.zeros(3)
    ),
    "Frobenius norm at zero, squared": _at(
        lambda w: torch.linalg.matrix_norm(w).square() + w.sum(), torch.zeros(2, 2)
    ),
    "dist at zero, squared": _at(lambda w: torch.dist(w, 0 * w).square() + w.sum(), torch.zeros(3)),
    "normalize at zero": _at(lambda w: F.normalize(w, dim=0), torch.zeros(3)),
    "cosine_similarity": _at(lambda w: F.cosine_similarity(w, w.flip(0), dim=0), [1.0, 2.0, 0.0]),
    "pow 2 at zero": _at(lambda w: w.pow(2) + w, torch.zeros(3)),
    "pow 3 at zero": _at(lambda w: w.pow(3) + w, torch.zeros(3)),
    "pow by a tensor, base zero": _at(
        lambda w: w.pow(torch.tensor([2.0, 3.0, 1.0])) + w, torch.zeros(3)
    ),
    "pow by a tensor": _at(lambda w, v: w.abs().pow(v), [1.0, 0.5, 2.0], [2.0, 1.0, 3.0]),
    "pow by zero": _at(lambda w, v: w.abs().pow(v), [1.5, 0.5, 2.0], [0.0, 1.0, 2.0]),
    "** by zero": _at(lambda w, v: w.abs() ** v, [1.5, 0.5, 2.0], [0.0, 1.0, 2.0]),
    "float_power by zero": _at(torch.float_power, [1.5, 0.5, 2.0], [0.0, 1.0, 2.0]),
    "bessel_j0": _at(lambda w: torch.special.bessel_j0(w) + w, [0.5, 0.3]),
    "i1": _at(torch.special.i1, [0.5, 0.3]),
    "pow of a number": _at(lambda w: 2.0**w, torch.zeros(3)),
    "square at zero": _at(lambda w: w.square() + w, torch.zeros(3)),
    "prod without a zero": _at(torch.prod, [2.0, 1.0, 3.0]),
    "prod with a zero": _at(torch.prod, [2.0, 0.0, 3.0]),
    "prod with two zeros": _at(lambda w: w.prod() + w.sum(), [2.0, 0.0, 0.0]),
    "prod over a dimension, with zeros": _at(
        lambda w: w.prod(1) + w.sum(), [[2.0, 0.0, 3.0], [0.0, 0.0, 1.0]]
    ),
    "cumprod with a zero": _at(lambda w: w.cumprod(0), [2.0, 0.0, 3.0]),
    "cumprod with two zeros": _at(lambda w: w.cumprod(0), [2.0, 0.0, 3.0, 0.0, 1.0]),
    "cumprod with a zero (2d)": _at(lambda w: w.cumprod(1), [[2.0, 0.0, 3.0], [1.0, 2.0, 0.0]]),
    "logsumexp": _at(lambda w: w.logsumexp(0), [0.0, 0.0, 1.0]),
    "logcumsumexp": _at(lambda w: w.logcumsumexp(0), [0.0, 0.0, 1.0]),
    "sinc at zero": _at(lambda w: w.sinc() + w, torch.zeros(3)),
    "xlogy": _at(lambda w: torch.xlogy(w, w), [1.0, 0.5]),
    "entr": _at(torch.special.entr, [1.0, 0.5]),
    "atan2": _at(torch.atan2, [1.0, 0.0], [0.0, 1.0]),
    "hypot": _at(torch.hypot, [1.0, 0.0], [0.0, 1.0]),
    "std of equal numbers, squared": _at(lambda w: w.std().square() + w.sum(), torch.ones(3)),
    "var of equal numbers": _at(lambda w: w.var() + w.sum(), torch.ones(3)),
    "softplus beyond its threshold": _at(lambda w: F.softplus(w), [25.0, 1.0]),
    "elu at zero": _at(lambda w: F.elu(w) + w, torch.tensor([0.0, 1.0])),
    "logaddexp of equal numbers": _at(torch.logaddexp, [1.0, 2.0], [1.0, 2.0]),
    "where with a root of zero": _at(
        lambda w: torch.where(w > 0, w.clamp(min=1e-30).sqrt(), w), [1.0, -1.0]
    ),
    "expm1 and log1p at zero": _at(lambda w: torch.expm1(w) + torch.log1p(w), torch.zeros(3)),
    "erf at zero": _at(lambda w: torch.erf(w), torch.zeros(3)),
    "i0 at zero": _at(lambda w: torch.special.i0(w) + w, torch.zeros(3)),
    "i0e": _at(lambda w: torch.special.i0e(w), [1.0, 2.0]),
    "i1 at zero": _at(lambda w: torch.special.i1(w), torch.zeros(3)),
    "lgamma": _at(torch.lgamma, [1.0, 2.5]),
    "median and kthvalue": _at(lambda w: w.median() + w.kthvalue(2)[0], [1.0, 3.0, 2.0]),
    "renorm": _at(lambda w: torch.renorm(w, 2, 0, 1.0), [[1.0, 2.0], [0.1, 0.2]]),
    "triangular_solve": _at(
        lambda w, b: torch.linalg.solve_triangular(w.tril() + torch.eye(3), b, upper=False),
        torch.zeros(3, 3),
        [[1.0], [2.0], [3.0]],
    ),
    "lu_solve": _at(
        lambda w, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(torch.eye(2) * 3 + w), b),
        [[0.3, -0.2], [0.5, 0.1]],
        [[1.0], [2.0]],
    ),
    "tensorsolve": _at(
        lambda w: torch.linalg.tensorsolve(
            torch.eye(4).view(2, 2, 2, 2) * 2 + w[:, :, None, None], torch.ones(2, 2)
        ),
        [[0.3, -0.2], [0.5, 0.1]],
    ),
    "householder_product": _at(
        lambda w, t: torch.linalg.householder_product(w, t),
        [[1.0, 0.0], [0.5, 1.0], [0.2, 0.3]],
        [0.8, 0.5],
    ),
    "fft": _at(lambda w: torch.fft.rfft(w).abs().square(), [1.0, 3.0, 2.0, 0.5]),
    "complex polar": _at(lambda r, a: torch.polar(r.abs(), a).real, [1.0, 2.0], [0.5, 0.3]),
    "einsum": _at(
        lambda a, b: torch.einsum("ij,jk->ik", a, b),
        [[1.0, 2.0], [0.3, 0.4]],
        [[1.0, 2.0], [0.3, 0.4]],
    ),
    "gradient checkpoint of a scan": _at(lambda w: _scan(w), [0.3, 0.2, 0.5]),
}


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.sqrt()) @ vectors.mT


def _polar(matrix: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(matrix)
    return u @ v


def _scan(w: Tensor) -> Tensor:
    x = torch.ones(3)
    for _ in range(4):
        x = torch.tanh(w * x + x.roll(1))
    return x


def zoo() -> dict[str, Make]:
    """Name -> what makes the case."""
    found = {f"nn.{name}": make for name, make in (NORMS | LAYERS | PARAMETRIZED).items()}
    found |= {f"nn.{name}": _after(make()) for name, make in ACTIVATIONS.items()}
    found |= {f"loss: {name}": make for name, make in LOSSES.items()}
    return found | {f"point: {name}": make for name, make in POINTS.items()}
