"""The loss of the head: chunks, frozen weights, and the softmax over a few tokens."""

import pytest
import torch
import torch.nn.functional as F

from m2helpers.engine import losses
from m2helpers.engine.losses import head_loss


@pytest.fixture(params=[3, 7, 256])
def case(request, monkeypatch):
    """States, a head and labels in double precision; chunks that divide the positions, do not, or hold them all."""
    monkeypatch.setattr(losses, "CHUNK", request.param)
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 11).double()
    torch.nn.init.normal_(head.bias)
    head.weight.requires_grad_(False)
    states = torch.randn(12, 5, dtype=torch.double, requires_grad=True)
    return states, head, torch.randint(2, 6, (12,))


def _gradients(loss, states, head):
    return torch.autograd.grad(2 * loss, [states, head.bias])


def test_it_is_the_cross_entropy_of_the_head(case):
    states, head, labels = case
    ours, theirs = head_loss(states, head, labels), F.cross_entropy(head(states), labels)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    for a, b in zip(_gradients(ours, states, head), _gradients(theirs, states, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_a_few_tokens_are_the_whole_softmax_renormalised(case):
    states, head, labels = case
    characters = torch.tensor([2, 3, 4, 5, 8])
    ours = head_loss(states, head, labels, characters)
    probability = head(states).softmax(-1)
    renormalised = probability[torch.arange(12), labels] / probability[:, characters].sum(-1)
    theirs = -renormalised.log().mean()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    for a, b in zip(_gradients(ours, states, head), _gradients(theirs, states, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_nothing_is_learned_without_gradients(case):
    states, head, labels = case
    with torch.no_grad():
        loss = head_loss(states, head, labels)
    assert not loss.requires_grad and loss == pytest.approx(head_loss(states, head, labels).item())
