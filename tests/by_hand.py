"""A run of MAML on a multilayer perceptron, computed by hand: plain autograd and a few formulas.

It shares nothing with metarun but the tasks, so that whatever a run shows can be held against it.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from metarun.config.run import TrainConfig
from metarun.episodes.source import Episodes, EpisodeSource


@dataclass
class Run:
    """What a run computes, by meta-step.

    Attributes:
        logged: metrics.jsonl without times: for each line its step and its figures by tag.
        best: step, score and confidence interval of the best validation.
        test: scores of the test tasks (tasks, inner steps + 1) of the best model.
        test_losses: likewise.
        chosen: the meta-parameters of the best model, in the order of `nn.Module`.
        final: those after the last meta-step.
    """

    logged: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    test: Tensor = field(default_factory=lambda: torch.empty(0))
    test_losses: Tensor = field(default_factory=lambda: torch.empty(0))
    chosen: list[Tensor] = field(default_factory=list)
    final: list[Tensor] = field(default_factory=list)


def initial_weights(config: TrainConfig, source: EpisodeSource) -> list[Tensor]:
    """Those that torch draws for such a network from the seed of the run."""
    torch.manual_seed(config.seed)
    sizes = [math.prod(source.input_shape), *config.backbone.hidden, source.outputs]
    layers = [nn.Linear(size, after) for size, after in pairwise(sizes)]
    return [p.detach().double() for layer in layers for p in layer.parameters()]


def output(weights: list[Tensor], x: Tensor) -> Tensor:
    """Of a multilayer perceptron; weights and biases in turn."""
    x = x.flatten(1)
    for i in range(0, len(weights), 2):
        x = x @ weights[i].T + weights[i + 1]
        if i + 2 < len(weights):
            x = x.relu()
    return x


def loss_and_score(kind: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """Cross entropy and the share of hits, or the mean squared error twice."""
    if kind == "regression":
        loss = ((outputs - targets) ** 2).mean()
        return loss, loss.item()
    hits = [int(scores.argmax()) == int(y) for scores, y in zip(outputs, targets, strict=True)]
    return F.nll_loss(outputs.log_softmax(1), targets), sum(hits) / len(hits)


def task_of(episodes: Episodes, index: int) -> Episodes:
    return Episodes(*(part[index] for part in episodes))


def adapted(
    kind: str, weights: list[Tensor], rates: Tensor, task: Episodes, steps: int
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The weights from before the first inner step to after the last, and the inner losses."""
    path, losses = [weights], []
    for step in range(steps):
        loss, _ = loss_and_score(kind, output(path[-1], task.support_x), task.support_y)
        grads = torch.autograd.grad(loss, path[-1], create_graph=True)
        rate = rates[min(step, len(rates) - 1)]
        path.append([w - rate * g for w, g in zip(path[-1], grads, strict=True)])
        losses.append(loss)
    return path, losses


def trace(
    config: TrainConfig, source: EpisodeSource, meta: list[Tensor], split: str, count: int
) -> tuple[Tensor, Tensor]:
    """Query losses and scores of the first tasks of a split, (tasks, inner steps + 1)."""
    weights, rates = _parts(config, meta)
    losses, scores = [], []
    for index in range(count):
        task = task_of(source.sample(split, index, 1), 0)
        weights = [w.detach().requires_grad_() for w in weights]
        path, _ = adapted(source.kind, weights, rates, task, config.algo.eval_inner_steps)
        found = [loss_and_score(source.kind, output(w, task.query_x), task.query_y) for w in path]
        losses.append([loss.item() for loss, _ in found])
        scores.append([score for _, score in found])
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(scores, dtype=torch.float64)


def run(config: TrainConfig, source: EpisodeSource) -> Run:
    """Train, validate and test as a config says: MAML with inner SGD and outer Adam."""
    trainer, outer = config.trainer, config.outer_opt
    assert (config.algo.order, config.inner_opt.name, outer.name) == (2, "sgd", "adam")
    meta = initial_weights(config, source)
    if config.inner_opt.learn:
        assert config.inner_opt.granularity == "step"
        meta.append(
            torch.full((config.algo.inner_steps,), config.inner_opt.lr, dtype=torch.float64)
        )
    score_name = "mse" if source.kind == "regression" else "accuracy"
    found, rows = Run(), []
    moments = [(torch.zeros_like(m), torch.zeros_like(m)) for m in meta]
    for done in range(1, trainer.steps + 1):
        leaves = [m.clone().requires_grad_() for m in meta]
        row, grads = _meta_batch(config, source, leaves, done - 1)
        rows.append(row)
        if outer.clip_norm is not None:
            scale = min(1.0, outer.clip_norm / (row["optim/grad_norm"] + 1e-6))
            grads = [g * scale for g in grads]
        rate = rate_after(config, done - 1)
        for i, g in enumerate(grads):
            first = outer.beta1 * moments[i][0] + (1 - outer.beta1) * g
            second = outer.beta2 * moments[i][1] + (1 - outer.beta2) * g**2
            moments[i] = first, second
            up, down = first / (1 - outer.beta1**done), second / (1 - outer.beta2**done)
            meta[i] = meta[i] - rate * up / (down.sqrt() + outer.eps)
        if done % trainer.log_every == 0 or done == trainer.steps:
            values = {tag.replace("score", score_name): _mean(r[tag] for r in rows) for tag in row}
            values["optim/lr"] = rate_after(config, done)
            if config.inner_opt.learn:
                values |= {f"inner/lr_step{i}": float(v) for i, v in enumerate(meta[-1])}
            found.logged.append({"step": done, **values})
            rows = []
        if done % trainer.eval_every == 0 or done == trainer.steps:
            losses, scores = trace(config, source, meta, "val", trainer.eval_episodes)
            score, ci95 = float(scores[:, -1].mean()), half_width(scores[:, -1])
            loss = float(losses[:, -1].mean())
            own = {f"val/{score_name}": score, "val/ci95": ci95, "val/loss": loss}
            found.logged.append({"step": done, **own})
            sign = -1 if score_name == "mse" else 1
            if found.best is None or sign * score > sign * found.best["score"]:
                found.best, found.chosen = {"step": done, "score": score, "ci95": ci95}, list(meta)
    tested = trace(config, source, found.chosen, "test", trainer.test_episodes)
    found.test_losses, found.test = tested
    found.final = meta
    return found


def rate_after(config: TrainConfig, steps: int) -> float:
    """The outer learning rate of the meta-step that comes after so many."""
    outer = config.outer_opt
    if outer.schedule == "constant":
        return float(outer.lr)
    share = (1 + math.cos(math.pi * steps / config.trainer.steps)) / 2
    return float(outer.min_lr + (outer.lr - outer.min_lr) * share)


def half_width(values: Tensor) -> float:
    """Of the 95 % confidence interval of the mean, by scipy's Student t."""
    listed = values.tolist()
    return float(stats.t.ppf(0.975, len(listed) - 1) * stats.sem(listed))


def _meta_batch(
    config: TrainConfig, source: EpisodeSource, leaves: list[Tensor], step: int
) -> tuple[dict[str, float], list[Tensor]]:
    """The figures of a meta-step and the gradient of the mean query loss."""
    size = config.trainer.meta_batch
    weights, rates = _parts(config, leaves)
    total, scores, inner = torch.zeros((), dtype=torch.float64), [], []
    for index in range(size):
        task = task_of(source.sample("train", step * size + index, 1), 0)
        path, losses = adapted(source.kind, weights, rates, task, config.algo.inner_steps)
        loss, score = loss_and_score(source.kind, output(path[-1], task.query_x), task.query_y)
        total = total + loss / size
        scores.append(score)
        inner.append([own.item() for own in losses])
    grads = torch.autograd.grad(total, leaves)
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
    row = {"train/loss": total.item(), "train/score": _mean(scores), "optim/grad_norm": norm}
    row |= {f"inner/loss_step{i}": _mean(own) for i, own in enumerate(zip(*inner, strict=True))}
    return row, list(grads)


def _parts(config: TrainConfig, meta: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Weights, and the inner learning rate of each inner step."""
    if config.inner_opt.learn:
        return meta[:-1], meta[-1]
    return meta, torch.tensor([config.inner_opt.lr], dtype=torch.float64)


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
