import pytest
import torch

from bitswitch.training import adapted_rate, paper_eta


@pytest.mark.parametrize(
    ("high", "low", "eta"),
    [(8, 8, 1), (8, 7, 0.5), (8, 6, 0.1), (8, 5, 0.05), (8, 4, 0.01), (8, 2, 0.001), (4, 3, 0.5), (4, 2, 0.1)],
)
def test_eta_is_the_papers(high, low, eta):
    assert paper_eta(high, low) == pytest.approx(eta)


def test_relative_form():
    gradients = [torch.tensor(-0.2), torch.tensor([0.1, -5.0]), torch.tensor(0.4)]
    rate = adapted_rate(5e-4, 0.1, gradients, "relative")
    assert float(rate) == pytest.approx(0.1 * 5e-4 * (1 - (0.2 + 1.0 + 0.4) / 3))


def test_printed_form_is_held_at_zero():
    assert float(adapted_rate(5e-4, 0.1, [torch.tensor(1e-4)], "printed")) == pytest.approx(0.1 * 4e-4)
    assert float(adapted_rate(5e-4, 0.1, [torch.tensor(1e-2)], "printed")) == 0


def test_off_is_the_rate_itself():
    assert adapted_rate(5e-4, 0.1, [torch.tensor(1.0)], "off") == 5e-4


@pytest.mark.parametrize("form", ["relative", "printed"])
def test_no_rate_is_ever_negative(form):
    for gradient in (0.0, 1e-3, 1.0, 1e6, -1e6):
        assert float(adapted_rate(5e-4, 1.0, [torch.tensor(gradient)], form)) >= 0
