"""Losses against float64 formulas over full logits, values and gradients."""

import types

import pytest
import torch

from compressor.training.losses import chunked, divergence, head_of, label_loss

N, D, V = 23, 8, 31


def reference(kind, temperature, beta, z_s, z_t):
    """The definitions, with probabilities and without any trick."""
    p_s, p_t = (torch.softmax(z / temperature, -1) for z in (z_s, z_t))
    if kind == "js":
        m = beta * p_t + (1 - beta) * p_s
        loss = beta * (p_t * (p_t / m).log()).sum(-1)
        loss = loss + (1 - beta) * (p_s * (p_s / m).log()).sum(-1)
    else:
        p, q = (p_t, p_s) if kind == "forward" else (p_s, p_t)
        loss = (p * (p / q).log()).sum(-1)
    return temperature**2 * loss


@pytest.fixture
def parts():
    torch.manual_seed(0)
    hidden_s, hidden_t = torch.randn(2, N, D), torch.randn(2, N, D)
    heads = torch.nn.Linear(D, V), torch.nn.Linear(D, V)
    mask = torch.rand(2, N) < 0.7
    return hidden_s, hidden_t, *heads, mask


CASES = [("forward", 1.0, 0.5), ("reverse", 2.0, 0.5), ("js", 1.0, 0.5), ("js", 3.0, 0.1)]


@pytest.mark.parametrize(("kind", "temperature", "beta"), CASES)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_divergences_and_their_gradients(parts, kind, temperature, beta, chunk):
    hidden_s, hidden_t, head_s, head_t, mask = parts
    loss = divergence(kind, temperature, beta)
    student = hidden_s.clone().requires_grad_()
    weights = list(head_s.parameters())
    both = lambda s, t: loss(head_s(s), head_t(t))  # noqa: E731
    value = chunked(both, [student, hidden_t], mask, chunk, weights)
    got = torch.autograd.grad(value, [student, head_s.weight, head_s.bias])

    exact_s, exact_t = (torch.nn.Linear(D, V).double() for _ in range(2))
    exact_s.load_state_dict(head_s.state_dict())
    exact_t.load_state_dict(head_t.state_dict())
    exact = hidden_s.double().requires_grad_()
    every = reference(kind, temperature, beta, exact_s(exact), exact_t(hidden_t.double()))
    wanted = every[mask].mean()
    gradients = torch.autograd.grad(wanted, [exact, exact_s.weight, exact_s.bias])
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    for mine, theirs in zip(got, gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)


def test_directions_differ_on_an_asymmetric_example():
    sure, unsure = torch.tensor([[4.0, 0.0, 0.0]]), torch.zeros(1, 3)
    p = torch.softmax(sure[0].double(), -1)
    forward = divergence("forward")(unsure, sure).item()
    assert forward == pytest.approx((p * (p * 3).log()).sum().item(), rel=1e-5)
    assert divergence("reverse")(unsure, sure).item() != pytest.approx(forward, rel=0.1)


def test_cross_entropy_with_labels(parts):
    hidden, _, head, _, mask = parts
    targets = torch.randint(V, mask.shape)
    value = chunked(lambda h, t: label_loss(head(h), t), [hidden, targets], mask, 5)
    p = head(hidden).double().softmax(-1)
    wanted = -p.gather(-1, targets[..., None])[..., 0].log()[mask].mean()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_full_logits_never_exist(parts):
    hidden_s, _, head, _, _ = parts
    sizes = []
    mask = torch.ones(2, N)

    def loss(h):
        sizes.append(len(h))
        return head(h).square().sum(-1)

    chunked(loss, [hidden_s.requires_grad_()], mask, 4, list(head.parameters())).backward()
    assert max(sizes) == 4 and sum(sizes) == 2 * N  # once: backward applies no head again


def test_head_with_soft_cap(pico_llama):
    model = pico_llama()
    hidden = torch.randn(3, 32)
    plain = model.module.lm_head(hidden)
    assert torch.equal(head_of(model)(hidden), plain)
    model.module.config = types.SimpleNamespace(final_logit_softcapping=2.0)
    assert torch.allclose(head_of(model)(hidden), 2 * torch.tanh(plain / 2))
