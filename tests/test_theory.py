"""The theory: prospect theory's functions, theorem 4.3, and the data of the two figures."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import theory
import toy_world
from common import response_logps
from conftest import example, plain

GRID = torch.linspace(0, 1, 1001, dtype=torch.float64)
BOTH, PAPER = theory.BETAS


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- the capacity function ----------------------------------------------------------------------------


def test_capacity_by_hand():
    """√0.2 / (√0.2 + √0.8)² = √0.2 / 1.8, and the figures of Tversky and Kahneman's median subject."""
    exact = numbers(0, math.sqrt(0.2) / 1.8, 2**-1.5, 1)
    torch.testing.assert_close(theory.capacity(numbers(0, 0.2, 0.5, 1), 0.5), exact)
    published = numbers(0.055, 0.186, 0.421, 0.712, 0.912)
    torch.testing.assert_close(
        theory.capacity(numbers(0.01, 0.1, 0.5, 0.9, 0.99), 0.61), published, rtol=0, atol=5e-4
    )


def test_capacity_is_an_inverse_s_with_one_crossing():
    over = theory.capacity(GRID, 0.61)[1:-1] > GRID[1:-1]
    crossings = (over[1:] != over[:-1]).nonzero()
    assert len(crossings) == 1 and over[0] and not over[-1]
    assert GRID[1:-1][crossings.item()].item() == pytest.approx(0.34, abs=0.005)
    bend = theory.capacity(GRID, 0.61).diff().diff()
    assert bend[0] < 0 < bend[-1] and (bend.sign().diff() != 0).sum() == 1  # concave, then convex


def test_capacity_is_monotone_from_028_on():
    assert all((theory.capacity(GRID, gamma).diff() > 0).all() for gamma in (0.28, 0.3, 0.61, 1.0))
    assert (theory.capacity(GRID, 0.25).diff() < 0).any()


def test_gamma_1_is_the_identity():
    torch.testing.assert_close(theory.capacity(GRID, 1.0), GRID)


def test_the_limit_s_bounds_by_hand():
    """Ratios 3, 1, 1/4: M_P = 3, M_R = 4. Means 1/5 and 1/8: ε_P = 3/5, ε_R = 1 / (4/8) = 2."""
    z = numbers(3, 1, 0.25).log()
    assert theory.limit_bounds(z, 1, 1, 4, 7) == pytest.approx((math.log(0.6), math.log(2)))


@pytest.mark.parametrize("clip", [True, False], ids=["clipping", "sampling"])
def test_which_tokens_keep_their_gradient_by_hand(clip):
    """First row: the bounds of the test above. Second: M_P = 5 and M_R = 1.25, so ε_P = 1 and ε_R = 6.4."""
    logratio = numbers(3, 1, 0.7, 0.5, 0.25, 9, 5, 0.8, 1.1, 9, 9, 9).view(2, 6).log()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()
    betas = 1, 1, 4, 7
    torch.manual_seed(0)
    if clip:
        kept = theory.kept_by_clipping(logratio, mask, betas)
    else:
        kept = theory.kept_by_sampling(logratio, mask, betas, 1e8)
    assert kept.int().tolist() == [[0, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0]]


def test_both_bounds_bite_on_the_random_logratios():
    z, mask = theory.random_logratios(500, seed=0)
    assert z.abs().max() <= 1 and {*mask.sum(-1).tolist()} == set(range(16, 65))
    for betas, sides in ((BOTH, 2), (PAPER, 1)):
        bounds = [theory.limit_bounds(row[m], *betas) for row, m in zip(z, mask)]
        low = sum((row[m] < P).sum().item() for row, m, (P, _) in zip(z, mask, bounds)) / mask.sum().item()
        high = sum((row[m] > R).sum().item() for row, m, (_, R) in zip(z, mask, bounds)) / mask.sum().item()
        assert all(P < 0 < R for P, R in bounds)
        assert low > 0.2 and (high > 0.2) == (sides == 2) and theory.BETAS[betas][0] == sides
        near = ((z - bounds[0][0]).abs() < 0.1)[mask].double().mean().item() / 0.2
        assert near == pytest.approx(theory.DENSITY, rel=0.05)


@pytest.mark.parametrize("betas", [BOTH, PAPER])
def test_sampling_converges_to_clipping_like_the_root_of_c(betas):
    shares = theory.disagreements(betas, 2048, seed=0)
    assert shares[0] > 0.3 and shares == sorted(shares, reverse=True)
    assert theory.slope(shares) == pytest.approx(-0.5, abs=0.03)
    sides = theory.BETAS[betas][0]
    for c, share in list(zip(theory.CONCENTRATIONS, shares))[3:]:
        assert share == pytest.approx(sides * theory.predicted_disagreement(betas[0], betas[2], c), rel=0.2)


@pytest.mark.parametrize("betas", [BOTH, PAPER])
def test_in_the_limit_the_sets_are_the_same(betas):
    z, mask = theory.random_logratios(500, seed=0)
    torch.manual_seed(0)
    clipped, sampled = theory.kept_by_clipping(z, mask, betas), theory.kept_by_sampling(z, mask, betas, 1e14)
    assert torch.equal(clipped, sampled) and 0.2 < clipped[mask].double().mean() < 0.8
    assert not clipped[~mask].any()


def test_predicted_disagreement_and_slope_by_hand():
    """s = √(3 / (1 · 4)), half a token a nat; shares below c = 64 are not fitted."""
    by_hand = 0.5 * math.sqrt(2 / math.pi) * math.sqrt(0.75)
    assert theory.predicted_disagreement(1, 3, 1) == pytest.approx(by_hand)
    assert theory.predicted_disagreement(1, 3, 100) == pytest.approx(by_hand / 10)
    shares = [c**-0.7 for c in theory.CONCENTRATIONS]
    assert theory.slope([1, 1, 1, *shares[3:]]) == pytest.approx(-0.7)


# --- the data of the figure of perceived distributions ----------------------------------------------


def test_tail_probability_by_hand():
    """A z of a level counts where it is met exactly; the ends are 0 and 1 whatever the source."""
    online, source = numbers(4, 2, 0, 1, 3), numbers(2, 9, 3, 2)
    levels = numbers(0, 0.25, 0.5, 0.75, 1)  # at or above ∞, 3, 2, 1, −∞
    assert theory.tail_probability(source, online, levels).tolist() == [0, 0.5, 1, 1, 1]


def test_online_is_the_diagonal_and_the_others_bend():
    torch.manual_seed(0)
    z = torch.randn(5000, dtype=torch.float64)
    for shift, low, high in ((0, -1e-3, 1e-3), (0.5, 0.1, 0.3), (-0.5, -0.3, -0.1)):
        bend = theory.tail_probability(z + shift, z, theory.LEVELS) - theory.LEVELS
        assert low <= bend[20:80].min() and bend[20:80].max() <= high


def perceived_by_a_human(z, gamma):
    """Tokens with each outcome as often as a human feels it to be, of equally likely ones."""
    tail = torch.linspace(1, 0, len(z) + 1, dtype=torch.float64)  # Pr(this outcome or a better one)
    weights = -theory.capacity(tail, gamma).diff()
    return z.sort().values.repeat_interleave((weights * 1e6).round().long())


def test_distance_is_to_what_a_human_sees():
    torch.manual_seed(0)
    online = torch.randn(4000, dtype=torch.float64)
    assert theory.distance(perceived_by_a_human(online, 0.61), online, 0.61) < 2e-3
    assert theory.distance(online, online, 1.0) < 2e-3
    levels = [i / 100 for i in range(101)]
    human = [a**0.61 / (a**0.61 + (1 - a) ** 0.61) ** (1 / 0.61) for a in levels]
    exact = sum(abs(h - a) for h, a in zip(human, levels)) / 101
    assert theory.distance(online, online, 0.61) == pytest.approx(exact, abs=1e-3)


def test_best_of_by_hand():
    assert theory.best_of(3, list("abcdef"), [1, 3, 2, -2, -1, 0]) == (["b", "f"], [3, 0])


def test_outcomes_are_the_log_ratios_of_all_response_tokens(policy):
    model, reference = (AutoModelForCausalLM.from_pretrained(policy).eval() for _ in range(2))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    examples = [example([5 + i % 7 for i in range(4 + n % 5)], 3) for n in range(300)]
    z = theory.outcomes(model, reference, examples)
    assert z.dtype == torch.float64 and len(z) == sum(len(e.ids) - 3 for e in examples)
    assert (theory.outcomes(reference, reference, examples) == 0).all()
    with torch.no_grad():
        one = response_logps(model, examples[4:5])[0] - response_logps(reference, examples[4:5])[0]
    torch.testing.assert_close(z[10:15], one[0].double(), rtol=0, atol=1e-5)  # after 1 + 2 + 3 + 4 tokens
    assert one.abs().min() > 1e-4


def test_write_samples_and_scores(policy):
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    prompts = ["abcd", "efgh"] * 8
    examples, rewards = theory.write(model, tokenizer, prompts, seed=1)
    again, same_rewards = theory.write(model, tokenizer, prompts, seed=1)
    assert plain(again) == plain(examples) and same_rewards == rewards
    assert plain(theory.write(model, tokenizer, prompts, seed=2)[0]) != plain(examples)
    assert [list(e.prompt[1:5]) for e in examples] == [tokenizer(p)["input_ids"] for p in prompts]
    lengths = [len(e.ids) - e.prompt_len for e in examples]
    assert max(lengths) <= toy_world.MAX_NEW_TOKENS["letters"] and len({*lengths}) > 1
    texts = [tokenizer.decode(e.response, skip_special_tokens=True) for e in examples]
    assert rewards == toy_world.letters_reward(prompts, texts)


def test_main_draws_both_figures_and_writes_the_numbers(monkeypatch, tmp_path, capsys):
    """With random outcomes in the place of trained policies'; the source made for a human is the nearest."""
    torch.manual_seed(0)
    online = torch.randn(2000, dtype=torch.float64)
    found = {name: torch.randn(2000, dtype=torch.float64) + 2 for name in theory.STYLES}
    found["offline-better"] = perceived_by_a_human(online, theory.GAMMA)
    disagreements = theory.disagreements
    monkeypatch.setattr(theory, "HERE", tmp_path)
    monkeypatch.setattr(theory, "sources", lambda folder, seed: (online, found, {"online": 0.123456}))
    monkeypatch.setattr(theory, "disagreements", lambda betas, n, seed: disagreements(betas, 256, seed))
    theory.main(seed=3)
    text = (tmp_path / "results" / "theory.json").read_text()
    report = json.loads(text)
    assert capsys.readouterr().out == text and report["seed"] == 3 and report["torch"] == torch.__version__
    assert report["mean_utility"] == {"online": 0.1235}
    assert '"concentration": [ 1, 4, 16,' in text  # a list takes one line
    slopes = [part["slope"] for part in report["theorem_4_3"].values() if isinstance(part, dict)]
    assert slopes == pytest.approx([-0.5, -0.5], abs=0.1)
    away = {name: report["perceived"][name]["mean_abs_difference"] for name in theory.STYLES}
    assert min(away, key=away.get) == "offline-better"
    better, human = report["perceived"]["offline-better"]["probability"], report["perceived"]["human"]
    assert better == pytest.approx(human, abs=2e-3)
    for name in ("theorem_4_3", "perceived"):
        image = theory.plt.imread(tmp_path / "figures" / f"{name}.png")
        assert image.shape[1] > 800 and image.std() > 0.05
