"""Routing: the best experts, the same ones everywhere, with weights and losses as their formulas say."""

from __future__ import annotations

import pytest
import torch

from lighterage.ops.router import load_balancing_loss, route, router_logits, router_z_loss


def test_logits_are_a_float32_product_that_saves_its_operands_as_they_are():
    x, weight = torch.randn(20, 16).bfloat16().requires_grad_(), torch.randn(8, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        logits = router_logits(x, weight)
    assert logits.dtype == torch.float32
    assert {t.untyped_storage()._cdata for t in saved} == {t.untyped_storage()._cdata for t in (x, weight)}
    wanted = x.float() @ weight.t()
    assert torch.equal(logits, wanted)
    for a, b in zip(
        torch.autograd.grad(logits.square().sum(), (x, weight)),
        torch.autograd.grad(wanted.square().sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_best_experts_are_chosen_with_their_scores_as_weights(score, normalize):
    logits = torch.randn(30, 8, requires_grad=True)
    routing = route(logits, 3, score=score, normalize=normalize)
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    best = scores.topk(3)
    assert torch.equal(routing.experts, best.indices)
    wanted = best.values / best.values.sum(-1, keepdim=True) if normalize else best.values
    torch.testing.assert_close(routing.weights, wanted)
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(30))
    toward = torch.randn(30, 3)
    grad, wanted_grad = (torch.autograd.grad((w * toward).sum(), logits)[0] for w in (routing.weights, wanted))
    torch.testing.assert_close(grad, wanted_grad)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, float("inf"), float("-inf")])
def test_of_equal_scores_the_smaller_number_wins(value):
    logits = torch.full((4, 64), 0.25)
    logits[1, 7::2] = -1.0
    assert route(logits, 3).experts.tolist() == [[0, 1, 2]] * 4
    tied = torch.zeros(2, 5)
    tied[1, 3] = -0.0
    assert route(tied, 5, bias=torch.full((5,), value)).experts.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_order_is_kept_for_scores_of_any_sign_and_size():
    bias = torch.tensor([-3.0, 1e-40, -1e-40, 0.0, 1e30, -1e30, 2.0])
    experts = route(torch.full((1, 7), -200.0), 7, score="sigmoid", bias=bias).experts[0]
    assert torch.equal(experts, torch.sort(bias, descending=True, stable=True).indices)


def test_a_bias_chooses_and_does_not_weigh():
    logits = torch.randn(10, 4)
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0])
    routing = route(logits, 1, bias=bias, normalize=False)
    assert routing.experts.unique().tolist() == [3]
    assert torch.equal(routing.weights, logits.softmax(-1)[:, 3:])


def test_balance_is_one_when_equal_and_the_number_of_experts_when_one_has_all():
    even = torch.full((12, 4), 0.25)
    assert load_balancing_loss(even, torch.tensor([6, 6, 6, 6])).item() == pytest.approx(1.0)
    one = torch.nn.functional.one_hot(torch.zeros(12, dtype=torch.int64), 4).float()
    assert load_balancing_loss(one, torch.tensor([24, 0, 0, 0])).item() == pytest.approx(4.0)


def test_balance_pulls_scores_away_from_the_expert_with_most_tokens():
    logits = torch.zeros(8, 4, requires_grad=True)
    loss = load_balancing_loss(logits.softmax(-1), torch.tensor([8, 0, 0, 0]))
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad[:, 0] > 0).all()
    assert (grad[:, 1:] < 0).all()


def test_z_loss_is_the_mean_square_of_the_logsumexp():
    logits = torch.randn(6, 5)
    assert router_z_loss(logits).item() == pytest.approx(logits.exp().sum(-1).log().square().mean().item(), rel=1e-5)


def test_no_token_gives_no_loss():
    logits = torch.zeros(0, 4, requires_grad=True)
    routing = route(logits, 2)
    assert routing.experts.shape == (0, 2)
    total = load_balancing_loss(routing.scores, torch.zeros(4, dtype=torch.int64)) + router_z_loss(logits)
    assert total.item() == 0
    total.backward()


@pytest.mark.parametrize(
    ("logits", "options", "match"),
    [
        (torch.zeros(3, 4).bfloat16(), {}, "float32 logits"),
        (torch.zeros(4), {}, "float32 logits"),
        (torch.zeros(3, 4), {"top_k": 5}, "from 1 to the 4 experts"),
        (torch.zeros(3, 4), {"top_k": 0}, "from 1"),
        (torch.zeros(3, 4), {"score": "relu"}, "softmax"),
    ],
)
def test_wrong_use_is_refused(logits, options, match):
    with pytest.raises(ValueError, match=match):
        route(logits, **({"top_k": 2} | options))
