"""Algorithms against learn2learn's, and what they adapt."""

import learn2learn as l2l
import pytest
import torch
import torch.nn.functional as F

from metarun.components.algo.anil import anil
from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem, accuracy
from metarun.components.algo.maml import maml
from metarun.components.backbone.conv4 import Conv4
from metarun.episodes.source import Episodes
from metarun.unroll import Checkpoint, Implicit, Truncated, adam, newton, sgd

WAY, LR = 3, 0.4


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return Conv4((1, 28, 28), WAY, width=8).double()


def episode() -> Episodes:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 2 * WAY, 1, 28, 28, dtype=torch.float64, generator=generator)
    labels = torch.arange(WAY).repeat_interleave(2)
    return Episodes(images[0], labels, images[1], labels)


def problem(optimizer=None, learn=(), groups=None, gradient="reverse") -> Problem:
    inner = InnerLoop(optimizer or sgd(LR), tuple(learn), "global", groups or {}, gradient)
    examples = episode().support_x
    return Problem(model(), OBJECTIVES["classification"], inner, WAY, lambda: [examples])


def gradient(algorithm) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    meta = {k: v.requires_grad_() for k, v in algorithm.init().items()}
    loss, _ = algorithm.loss(meta, episode())
    return loss, dict(zip(meta, torch.autograd.grad(loss, list(meta.values())), strict=True))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_maml_has_the_loss_and_gradient_of_learn2learn(order: int, steps: int) -> None:
    loss, ours = gradient(maml(problem(), order=order, inner_steps=steps))
    oracle_model = model()
    oracle = l2l.algorithms.MAML(oracle_model, lr=LR, first_order=order == 1)
    learner, task = oracle.clone(), episode()
    for _ in range(steps):
        learner.adapt(F.cross_entropy(learner(task.support_x), task.support_y))
    expected = F.cross_entropy(learner(task.query_x), task.query_y)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    theirs = {name: p.grad for name, p in oracle_model.named_parameters()}
    assert set(ours) == set(theirs)
    difference = sum((ours[k] - theirs[k]).pow(2).sum() for k in ours) ** 0.5
    assert difference / sum(g.pow(2).sum() for g in theirs.values()) ** 0.5 < 1e-10


def test_orders_differ() -> None:
    first, second = (gradient(maml(problem(), order=order))[1] for order in (1, 2))
    assert any(not torch.allclose(first[k], second[k]) for k in first)


def test_anil_is_learn2learns_maml_on_the_head() -> None:
    loss, ours = gradient(anil(problem(), inner_steps=2))
    body_and_head = model()
    head = l2l.algorithms.MAML(body_and_head.head, lr=LR)
    task = episode()

    def features(x: torch.Tensor) -> torch.Tensor:
        return body_and_head.body(x).mean(dim=(-2, -1))

    learner = head.clone()
    for _ in range(2):
        learner.adapt(F.cross_entropy(learner(features(task.support_x)), task.support_y))
    expected = F.cross_entropy(learner(features(task.query_x)), task.query_y)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    for name, parameter in body_and_head.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-8, atol=1e-11)


class Uncut(torch.nn.Module):
    """The same network for one that cannot see where the head begins."""

    def __init__(self, known: torch.nn.Module) -> None:
        super().__init__()
        self.body, self.head = known.body, known.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean(dim=(-2, -1)))


@pytest.mark.parametrize("adapt", [["head.*"], ["head.bias"], ["body.3.*", "head.*"]])
def test_sharing_the_features_changes_nothing(adapt: list[str]) -> None:
    settings = {"inner_steps": 3, "adapt": adapt}
    loss, shared = gradient(maml(problem(), **settings))
    expected_loss, expected = gradient(maml(problem()._replace(model=Uncut(model())), **settings))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for name, value in expected.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-9, atol=1e-12)


def test_anil_computes_features_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        Conv4, "features", lambda self, x: calls.append(x) or self.body(x).mean(dim=(-2, -1))
    )
    ours = anil(problem(), inner_steps=5, eval_inner_steps=7)
    calls.clear()  # of the comparison with the whole
    ours.loss(ours.init(), episode())
    assert len(calls) == 2, "those of the support and of the query"
    ours.trace(ours.init(), episode())
    assert len(calls) == 4


def test_a_pattern_chooses_what_is_adapted() -> None:
    chosen = maml(problem(), adapt=["head.*", "body.3.*"])
    whole = maml(problem())
    frozen = maml(problem(), adapt=["head.*"])
    losses = [gradient(a)[0].item() for a in (chosen, whole, frozen)]
    assert len(set(losses)) == 3
    assert (
        frozen.loss(frozen.init(), episode())[0]
        == anil(problem()).loss(frozen.init(), episode())[0]
    )
    with pytest.raises(ValueError, match="no parameter matches 'tail'; there are: body"):
        maml(problem(), adapt=["tail"])


@pytest.mark.parametrize("mode", ["checkpoint", "mixed", Checkpoint(2)], ids=str)
@pytest.mark.parametrize("algorithm", [maml, anil])
def test_exact_gradient_modes_change_nothing(algorithm, mode) -> None:
    options = {"optimizer": adam(0.01), "learn": ["lr", "beta1"]}
    loss, ours = gradient(algorithm(problem(**options, gradient=mode), inner_steps=3))
    same, reverse = gradient(algorithm(problem(**options), inner_steps=3))
    assert loss == same
    difference = sum((ours[k] - reverse[k]).pow(2).sum() for k in ours) ** 0.5
    assert difference / sum(g.pow(2).sum() for g in reverse.values()) ** 0.5 < 1e-10


def test_first_order_is_first_order_in_every_gradient_mode() -> None:
    _, ours = gradient(maml(problem(gradient="mixed"), order=1, inner_steps=2))
    _, first = gradient(maml(problem(gradient="first_order"), order=2, inner_steps=2))
    assert all(torch.equal(ours[k], first[k]) for k in ours)


def test_modes_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot learn lr .* inner_opt\.learn empty"):
        maml(problem(learn=["lr"], gradient=Implicit()))
    with pytest.raises(ValueError, match=r"choose engine\.gradient=checkpoint"):
        anil(problem(newton(joint=True), gradient="mixed"))


def test_per_shot_reduction_multiplies_the_inner_learning_rate_by_the_way() -> None:
    loss, _ = gradient(maml(problem(sgd(LR)), reduction="per_shot"))
    same, _ = gradient(maml(problem(sgd(LR * WAY)), reduction="mean"))
    torch.testing.assert_close(loss, same, rtol=1e-11, atol=0)


def test_learned_hyperparameters_are_meta_parameters_with_a_gradient() -> None:
    for optimizer, learn in ((sgd(LR, momentum=0.5), ["lr", "momentum"]), (adam(0.01), ["beta2"])):
        algorithm = maml(problem(optimizer, learn), inner_steps=2)
        extra = set(algorithm.init()) - {name for name, _ in model().named_parameters()}
        assert extra == {f"inner_opt.{name}" for name in learn}
        _, gradients = gradient(algorithm)
        assert all(gradients[name].abs() > 0 for name in extra)


@pytest.mark.parametrize(
    "mode",
    ["reverse", "first_order", "checkpoint", "mixed", Truncated(1), Implicit(), "evolution"],
    ids=str,
)
@pytest.mark.parametrize("algorithm", [maml, anil])
def test_no_inner_step_means_none(algorithm, mode) -> None:
    """Training then is that of one network on the queries; nothing adapts to the support."""
    for chosen in ({"gradient": mode}, {"gradient": mode, "optimizer": adam(0.1)}):
        ours = algorithm(problem(**chosen), inner_steps=0, eval_inner_steps=0)
        loss, gradients = gradient(ours)
        plain, task = model(), episode()
        expected = F.cross_entropy(plain(task.query_x), task.query_y)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-12)
        assert ours.loss(ours.init(), task)[1]["inner_losses"].shape == (0,)
        trace = ours.trace(ours.init(), task)
        torch.testing.assert_close(trace.query_loss, expected.detach()[None], rtol=1e-12, atol=0)


def test_trace_follows_the_score_over_inner_steps() -> None:
    algorithm = maml(problem(), inner_steps=1, eval_inner_steps=4)
    trace = algorithm.trace(algorithm.init(), episode())
    assert trace.query_loss.shape == trace.query_score.shape == (5,)
    loss, extra = algorithm.loss(algorithm.init(), episode())
    torch.testing.assert_close(trace.query_loss[1], loss)
    torch.testing.assert_close(trace.query_score[1], extra["score"])


def test_accuracy_counts_hits() -> None:
    scores = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 9.0]])
    assert accuracy(scores, torch.tensor([0, 1, 1, 1])) == 0.75


def test_scores_that_are_no_numbers_have_no_accuracy() -> None:
    labels = torch.tensor([0, 1])
    scores = torch.tensor([[2.0, 1.0], [0.0, torch.inf]])
    assert float(accuracy(scores, labels)) == 1
    scores[0, 1] = torch.nan  # the highest, as argmax has it
    assert accuracy(scores, labels).isnan()
    tasks = torch.stack([scores, scores.nan_to_num()])
    by_task = torch.func.vmap(lambda s: accuracy(s, labels))(tasks)
    assert by_task.isnan().tolist() == [True, False]
