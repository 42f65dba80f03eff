"""The losses against values worked out by hand."""

import math

import torch
import torch.nn.functional as F

from pudnet.training.losses import class_means, cosine_logits, group_losses, ridge_logits


def test_class_means():
    features = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 5.0]])
    assert class_means(features, torch.tensor([0, 0, 1]), 2).tolist() == [[2.0, 1.0], [0.0, 5.0]]


def test_cosine_logits():
    logits = cosine_logits(torch.tensor([[2.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]]), torch.tensor(10.0))
    assert torch.allclose(logits, torch.tensor([[10.0, 0.0]]))


def test_group_losses_by_hand_and_their_gradients():
    # Two classes, one support and one query image each; features along the axes, so the logits are 10 and 0.
    features = torch.eye(2).repeat(2, 1).requires_grad_()
    labels = torch.tensor([0, 1, 0, 1])
    auxiliary = torch.zeros(4, 5, requires_grad=True)
    terms = group_losses(features, labels, 2, torch.tensor(10.0), auxiliary, torch.tensor([4, 2]))
    cross_entropy = math.log(1 + math.exp(-10))
    assert math.isclose(terms["cosine"].item(), cross_entropy, rel_tol=1e-3)
    assert math.isclose(terms["auxiliary"].item(), math.log(5), rel_tol=1e-6)
    # The teacher says one half each: KL(teacher || student).
    agreement = math.log(0.5) + 0.5 * (cross_entropy + (10 + cross_entropy))
    assert math.isclose(terms["agreement"].item(), agreement, rel_tol=1e-4)
    assert terms["accuracy"].item() == 1.0
    terms["agreement"].backward()
    assert auxiliary.grad is None  # the teacher is not taught
    assert features.grad[:2].abs().sum() == 0  # support features are detached


def test_ridge_logits_are_those_of_the_normal_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    x, query = (torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (12, 5))
    labels, penalty = torch.arange(12) % 3, 0.2
    centred, targets = x - x.mean(0), F.one_hot(labels, 3).double()
    lam = penalty * centred.square().sum(1).mean()
    weight = torch.linalg.solve(
        centred.T @ centred + lam * torch.eye(7, dtype=torch.float64), centred.T @ (targets - targets.mean(0))
    )
    expected = (query - x.mean(0)) @ weight + targets.mean(0)
    torch.testing.assert_close(ridge_logits(x, labels, query, 3, penalty), expected)
