"""Muon against the singular value decomposition, and against PyTorch's own."""

import pytest
import torch

from m2helpers.pretraining.muon import Muon, orthogonalise


def _matrices(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_orthogonalise_keeps_the_vectors_and_evens_the_values():
    (x,) = _matrices(0, (3, 8, 20))
    u, s, v = torch.linalg.svd(x.detach(), full_matrices=False)
    result = orthogonalise(x.detach())
    inside = u.mT @ result @ v.mT  # diagonal, if the singular vectors are the same
    values = torch.diagonal(inside, dim1=1, dim2=2)
    torch.testing.assert_close(inside, torch.diag_embed(values), atol=1e-4, rtol=0)
    assert s.max() / s.min() > 3 and values.min() > 0.6 and values.max() < 1.3


def test_steps_are_those_of_pytorchs_muon():
    """PyTorch's iterations run in bfloat16, so the two agree to about a per cent of a step."""
    shapes = [(8, 20), (20, 8), (8, 20), (6, 6)]
    ours, theirs = _matrices(1, *shapes), _matrices(1, *shapes)
    start = [p.detach().clone() for p in ours]
    mine = Muon([{"params": ours, "muon": True, "weight_decay": 0.1}], lr=0.03)
    reference = torch.optim.Muon(theirs, lr=0.03, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for parameters in (ours, theirs):
            for p in parameters:
                p.grad = torch.cos(p.detach() * 3 + step)
        mine.step()
        reference.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert (p - before).norm() > 0.05
        assert (p - q).norm() < 0.03 * (p - before).norm()


def test_other_parameters_take_adamws_steps():
    (ours,), (theirs,), (matrix,) = _matrices(2, (7,)), _matrices(2, (7,)), _matrices(3, (4, 4))
    groups = [{"params": [matrix], "muon": True, "weight_decay": 0.0}, {"params": [ours], "weight_decay": 0.0}]
    mine = Muon(groups, lr=0.01)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(3):
        for p in (ours, theirs, matrix):
            p.grad = torch.sin(p.detach() + step)
        mine.step()
        reference.step()
        assert matrix.grad is None  # or AdamW would have stepped it too
    torch.testing.assert_close(ours, theirs)
    assert set(mine.state[matrix]) == {"momentum_buffer"} and ours.detach() != pytest.approx(0)
