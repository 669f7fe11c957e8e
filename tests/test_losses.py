"""Perception and the losses, as pure functions: the authors' numbers, and the properties they rest on."""

import json
import math
from pathlib import Path

import pytest
import torch

import humanline_dpo
import humanline_grpo
import humanline_kto

CASES = json.loads((Path(__file__).parent / "data" / "golden_losses.json").read_text())
OFF = dict(mode="off", log_eps_P=-1.5, log_eps_R=1.5, gamma_P=0.5, gamma_R=0.01)
CLIP, SAMPLE = {**OFF, "mode": "clip"}, {**OFF, "mode": "sample"}


def tensors(case, *names):
    found = [torch.tensor(case[name]) for name in names]
    return [t.double() if t.is_floating_point() else t for t in found]


def perceived_as_in(script, case, logratio, mask):
    options = dict(OFF, log_eps_P=float(case["log_eps_P"]), log_eps_R=float(case["log_eps_R"]))
    options["mode"] = "clip" if case["humanline"] else "off"
    return script.perceive(logratio, mask, **options)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"seed{c['seed']}")
def test_dpo_loss_and_gradient_are_the_authors(case):
    """Theirs are three chosen rows, then three rejected ones; ours chosen, rejected, chosen, …"""
    logp, ref_logp, mask, losses, grad = tensors(
        case["dpo"], "logp", "ref_logp", "mask", "losses", "grad_of_mean"
    )
    logp, ref_logp, mask, grad = (x[[0, 3, 1, 4, 2, 5]] for x in (logp, ref_logp, mask.bool(), grad))
    logp.requires_grad_()
    perceived = perceived_as_in(humanline_dpo, case, logp - ref_logp, mask)
    ours = humanline_dpo.dpo_loss(perceived, mask, case["beta"])
    ours.mean().backward()
    torch.testing.assert_close(ours, losses, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(logp.grad, grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"seed{c['seed']}")
def test_kto_loss_and_gradient_are_the_authors(case):
    c = case["kto"]
    logp, ref_logp, mask, desirable, losses, grad = tensors(
        c, "logp", "ref_logp", "mask", "desirable", "losses", "grad_of_mean"
    )
    kl_logp, kl_ref_logp, kl_mask = tensors(c, "kl_logp", "kl_ref_logp", "kl_mask")
    logp.requires_grad_()
    point = perceived_as_in(humanline_kto, case, kl_logp - kl_ref_logp, kl_mask.bool())
    kl = point.sum(-1).mean().clamp_min(0)
    assert kl.item() == pytest.approx(c["kl"], rel=1e-5, abs=1e-7)
    perceived = perceived_as_in(humanline_kto, case, logp - ref_logp, mask.bool())
    ours = humanline_kto.kto_loss(perceived, mask.bool(), desirable.bool(), kl, case["beta"],
                                  c["desirable_weight"], c["undesirable_weight"])  # fmt: skip
    ours.mean().backward()
    torch.testing.assert_close(ours, losses, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(logp.grad, grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"seed{c['seed']}")
def test_grpo_loss_and_gradient_are_the_authors(case):
    c = case["grpo"]
    logp, ref_logp, mask, advantage, grad = tensors(c, "logp", "ref_logp", "mask", "advantage", "grad")
    logratio, mask = logp.requires_grad_() - ref_logp, mask.bool()
    perceived = perceived_as_in(humanline_grpo, case, logratio, mask)
    ours = humanline_grpo.grpo_loss(logratio, perceived, mask, advantage, c["epsilon"], c["beta"])
    loss = ours.sum() / mask.sum()
    loss.backward()
    assert loss.item() == pytest.approx(c["token_mean_loss"], rel=1e-6)
    torch.testing.assert_close(logp.grad, grad, rtol=1e-6, atol=1e-9)
    still = humanline_grpo.grpo_loss(logratio, perceived, mask, 0 * advantage, c["epsilon"], 1.0)
    assert (still.sum() / mask.sum()).item() == pytest.approx(c["token_mean_kl"], rel=1e-6)


def test_grpo_exponents_are_bounded():
    """A log-ratio of ±1000, unclipped: finite loss, finite gradient, and 0 on padding whatever it holds."""
    z = torch.tensor([[1000.0, -1000.0, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    for advantage in (1.0, -1.0):
        losses = humanline_grpo.grpo_loss(z, z, mask, torch.tensor([advantage]), 0.2, 0.1)
        (gradient,) = torch.autograd.grad(losses.sum(), z)
        assert losses.isfinite().all() and gradient.isfinite().all() and losses[0, 2] == 0


def test_dpo_loss_by_hand():
    """Rows chosen, rejected, …; margins ln 3 and 0 at β = 1: −log(3/4) and −log(1/2)."""
    logratio = torch.tensor([[math.log(3), 7.0], [0.0, 0.0], [0.5, 0.5], [1.0, 9.0]])
    mask = torch.tensor([[1, 0], [1, 1], [1, 1], [1, 0]]).bool()
    expected = torch.tensor([math.log(4 / 3), math.log(2)])
    torch.testing.assert_close(humanline_dpo.dpo_loss(logratio, mask, 1.0), expected)


def test_dpo_loss_is_finite_where_the_margin_is_huge():
    logratio = torch.tensor([[-1e4], [1e4]], requires_grad=True)
    loss = humanline_dpo.dpo_loss(logratio, torch.ones(2, 1).bool(), 1.0)
    loss.sum().backward()
    assert loss.item() == 2e4 and logratio.grad.tolist() == [[-1.0], [1.0]]


def test_kto_weighs_each_class_with_its_own_weight():
    """At a log-ratio of ẑ0 the loss is half the weight."""
    desirable, z = torch.tensor([True, False]), torch.full((2, 1), 0.7)
    ours = humanline_kto.kto_loss(z, z > 0, desirable, torch.tensor(0.7), 0.5, 3.0, 5.0)
    assert ours.tolist() == [1.5, 2.5]


def test_clipping_has_gradient_0_outside_and_1_inside(script):
    z = torch.tensor([[-1e4, -1.6, -1.4, 0.0, 1.4, 1.6, 1e4]], requires_grad=True)
    perceived, low, high = script.perceive(z, torch.ones(1, 7).bool(), **CLIP)
    perceived.sum().backward()
    assert z.grad.tolist() == [[0, 0, 1, 1, 1, 0, 0]]
    torch.testing.assert_close(perceived, torch.tensor([[-1.5, -1.5, -1.4, 0, 1.4, 1.5, 1.5]]))
    assert low.tolist() == [[True, True] + [False] * 5] and high.tolist() == [[False] * 5 + [True, True]]


@pytest.mark.parametrize("options", [OFF, CLIP, SAMPLE], ids=lambda o: o["mode"])
def test_padding_counts_nothing_whatever_it_holds(script, options):
    torch.manual_seed(0)
    garbage = torch.tensor([[0.5, -9.0, math.nan, math.inf, -math.inf]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0]]).bool()
    perceived, low, high = script.perceive(garbage, mask, **options)
    perceived.sum().backward()
    assert perceived[0, 2:].tolist() == [0, 0, 0] and garbage.grad[0, 2:].tolist() == [0, 0, 0]
    assert not (low | high)[0, 2:].any()


@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_sampling_keeps_values_and_takes_gradients(script, size):
    torch.manual_seed(0)
    z = (size * torch.randn(32, 64)).requires_grad_()
    mask = torch.arange(64) < torch.randint(1, 65, (32, 1))
    perceived, low, high = script.perceive(z, mask, **SAMPLE)
    perceived.sum().backward()
    assert torch.equal(perceived, torch.where(mask, z, 0.0))
    assert torch.equal(z.grad, (mask & ~low & ~high).float())
    assert (low | high).any() and (size > 1 or (mask & ~low & ~high).any())


def test_sampling_does_not_depend_on_the_other_rows(script):
    """M is the response's own: a row with enormous ratios must not reject the tokens of another."""
    calm = torch.zeros(1, 2000)
    wild = torch.cat([calm, torch.linspace(-50, 50, 2000)[None]])
    rates = []
    for z in (calm, wild):
        torch.manual_seed(0)
        _, low, high = script.perceive(z, torch.ones_like(z).bool(), **SAMPLE)
        rates.append((low | high)[0].float().mean().item())
    # with all ratios 1, a token is rejected when B_P > 1 or B_R > 1: never
    assert rates == [0.0, 0.0]


@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize("gamma, beta, chance", [(0.5, 1, 1 - 0.3**0.5), (0.01, 1, 1 - 0.3**0.01), (2, 3, 0.6517)])
def test_rejection_has_the_probability_of_the_beta(script, side, gamma, beta, chance):
    """Where π_θ/π_ref = 0.3 M_P, a token is rejected with P(B_P > 0.3); on the high side, of the inverse,
    with P(B_R > 0.3). Draws with γ = 0.01 underflow. The two sides must not trade their parameters."""
    z = torch.full((4000, 8), math.log(0.3) * (1 if side == "low" else -1))
    z[:, 0] = 0.0
    torch.manual_seed(0)
    never = (1e-6, 1.0)  # as good as B = 0
    (gamma_P, beta_P), (gamma_R, beta_R) = ((gamma, beta), never)[:: 1 if side == "low" else -1]
    found = script.perceive(z, torch.ones_like(z).bool(), "sample", -1.5, 1.5, gamma_P, gamma_R, beta_P, beta_R)
    rejected, other = found[1:] if side == "low" else found[:0:-1]
    assert not rejected[:, 0].any()
    assert rejected[:, 1:].float().mean().item() == pytest.approx(chance, abs=0.01)
    assert other.float().mean() < 1e-3


def test_clipping_is_the_limit_of_sampling(script):
    """Theorem 4.3: as the Betas concentrate on their means, the same tokens keep their gradient as under
    the bounds log(M_P γ_P/(γ_P+β_P)) and −log(M_R γ_R/(γ_R+β_R))."""
    torch.manual_seed(0)
    z = torch.randn(64, 50)
    mask = torch.ones_like(z).bool()
    mean_P, mean_R, strength = 0.2, 0.15, 1e6
    _, low, high = script.perceive(
        z, mask, "sample", -1.5, 1.5, strength * mean_P, strength * mean_R,
        strength * (1 - mean_P), strength * (1 - mean_R))  # fmt: skip
    bound_P = z.amax(-1, keepdim=True) + math.log(mean_P)
    bound_R = -((-z).amax(-1, keepdim=True) + math.log(mean_R))
    differ = (low != (z < bound_P)) | (high != (z > bound_R))
    assert differ.float().mean() < 2e-3 and low.any() and high.any()
