"""Muon's orthogonalization, and its matrices divided among workers."""

import pytest
import torch

from vitrm.training.optimizers import Muon, orthogonalized
from vitrm.training.parallel.cpu_workers import Workers


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Five rounds as Jordan (2024) writes them, in float64: what the short cut over [m, m] matrices has to equal."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.float()


@pytest.mark.parametrize("shape", [(16, 16), (16, 20), (16, 144), (144, 16), (20, 16)])
@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4])
def test_orthogonalized_is_newton_schulz(shape, smallest):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, torch.log10(torch.tensor(smallest)).item(), min(shape))
    matrix = (left * values) @ right
    expected = newton_schulz(matrix if shape[0] <= shape[1] else matrix.T)
    found = orthogonalized(matrix)
    torch.testing.assert_close(found if shape[0] <= shape[1] else found.T, expected, atol=2e-3, rtol=0)
    if smallest == 1.0:  # nothing small is left over after five rounds
        assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.35


def test_workers_update_as_one_thread_does():
    """To the last bit, however the matrices are dealt out; each of them once."""
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 3, 3, 3), (24, 8), (8, 40), (4, 4)]
    start = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    results = []
    for workers in (None, Workers(2), Workers(3)):
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        muon = Muon([{"params": weights}], lr=0.02, weight_decay=0.1, workers=workers)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()
            muon.step()
        results.append(weights)
    for weights in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], weights, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(results[0], start, strict=True))
