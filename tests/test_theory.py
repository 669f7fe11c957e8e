"""The capacity function, and theorem 4.3 with the data of its figure."""

import json
import math

import pytest
import torch

import theory

GRID = torch.linspace(0, 1, 1001, dtype=torch.float64)
BOTH, PAPER = theory.BETAS


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_capacity_by_hand():
    """√0.2 / (√0.2 + √0.8)² = √0.2 / 1.8, and the figures of Tversky and Kahneman's median subject."""
    exact = numbers(0, math.sqrt(0.2) / 1.8, 2**-1.5, 1)
    torch.testing.assert_close(theory.capacity(numbers(0, 0.2, 0.5, 1), 0.5), exact)
    published = numbers(0.055, 0.186, 0.421, 0.712, 0.912)
    felt = theory.capacity(numbers(0.01, 0.1, 0.5, 0.9, 0.99), 0.61)
    torch.testing.assert_close(felt, published, rtol=0, atol=5e-4)
    torch.testing.assert_close(theory.capacity(GRID, 1.0), GRID)


def test_capacity_overrates_what_is_unlikely_and_is_monotone_from_028_on():
    over = theory.capacity(GRID, 0.61)[1:-1] > GRID[1:-1]
    crossings = (over[1:] != over[:-1]).nonzero()
    assert len(crossings) == 1 and over[0] and not over[-1]
    assert GRID[1:-1][crossings.item()].item() == pytest.approx(0.34, abs=0.005)
    assert all((theory.capacity(GRID, gamma).diff() > 0).all() for gamma in (0.28, 0.3, 0.61, 1.0))
    assert (theory.capacity(GRID, 0.25).diff() < 0).any()


@pytest.mark.parametrize("clip", [True, False], ids=["clipping", "sampling"])
def test_which_tokens_keep_their_gradient_by_hand(clip):
    """Means 1/5 and 1/8. First row: M_P = 3 and M_R = 4, so ε_P = 3/5 and ε_R = 1 / (4/8) = 2. Second: M_P = 5 and
    M_R = 1.25, so ε_P = 1 and ε_R = 6.4."""
    logratio = numbers(3, 1, 0.7, 0.5, 0.25, 9, 5, 0.8, 1.1, 9, 9, 9).view(2, 6).log()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()
    betas = 1, 1, 4, 7
    assert theory.limit_bounds(logratio[0, :5], *betas) == pytest.approx((math.log(0.6), math.log(2)))
    torch.manual_seed(0)
    if clip:
        kept = theory.kept_by_clipping(logratio, mask, betas)
    else:
        kept = theory.kept_by_sampling(logratio, mask, betas, 1e8)
    assert kept.int().tolist() == [[0, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize("betas", [BOTH, PAPER])
def test_sampling_converges_to_clipping_like_the_root_of_c(betas):
    shares = theory.disagreements(betas, 2048, seed=0)
    assert shares[0] > 0.3 and shares == sorted(shares, reverse=True)
    assert theory.slope(shares) == pytest.approx(-0.5, abs=0.03)
    sides, *_ = theory.BETAS[betas]
    for c, share in list(zip(theory.CONCENTRATIONS, shares))[3:]:
        assert share == pytest.approx(sides * theory.predicted_disagreement(betas[0], betas[2], c), rel=0.2)
    z, mask = theory.random_logratios(500, seed=0)
    clipped, sampled = theory.kept_by_clipping(z, mask, betas), theory.kept_by_sampling(z, mask, betas, 1e14)
    assert torch.equal(clipped, sampled) and 0.2 < clipped[mask].double().mean() < 0.8


def test_main_draws_the_figure_and_writes_the_committed_numbers(monkeypatch, tmp_path):
    """Of fewer responses: the slopes are about those that stand in results/theory.json."""
    committed = json.loads((theory.HERE / "results/theory.json").read_text())
    disagreements = theory.disagreements
    monkeypatch.setattr(theory, "HERE", tmp_path)
    monkeypatch.setattr(theory, "disagreements", lambda betas, n, seed: disagreements(betas, 1024, seed))
    (tmp_path / "figures").mkdir()
    (tmp_path / "results").mkdir()
    theory.main(seed=0)
    report = json.loads((tmp_path / "results/theory.json").read_text())
    assert report.keys() == committed.keys() and theory.plt.imread(tmp_path / "figures/theorem_4_3.png").std() > 0.05
    for name in [name for name in committed["theorem_4_3"] if name != "concentration"]:
        assert report["theorem_4_3"][name]["slope"] == pytest.approx(committed["theorem_4_3"][name]["slope"], abs=0.03)
