"""AdamW with a pull on masked-out weights: the paper's formulas, the sign, and peers."""

import math

import pytest
import torch
from torch import nn

from compressor.training.masked_adamw import MaskedAdamW
from compressor.training.snapshot import State, read_snapshot, write_snapshot
from compressor.training.straight_through import Masked, make_hard, mask_weight

LR, DECAY, BETAS, EPS = 0.1, 0.3, (0.9, 0.95), 1e-8


def setting(form, ramp=4.0, weight_decay=0.1, decay=DECAY, dtype=torch.float64):
    torch.manual_seed(3)
    weight = nn.Parameter(torch.randn(3, 8, dtype=dtype))
    mask = Masked(weight, "2:4", 0.5)
    groups = [{"params": [weight], "lr": LR, "weight_decay": weight_decay}]
    optimizer = MaskedAdamW(groups, {weight: mask}, BETAS, decay, ramp, form, EPS)
    return weight, mask, optimizer


def gradients(steps, dtype=torch.float64):
    draw = torch.Generator().manual_seed(9)
    return [torch.randn(3, 8, generator=draw, dtype=dtype) for _ in range(steps)]


def by_hand(w, keeps, grads, form, ramp):
    """The formulas of the paper for one weight, with Python's numbers."""
    m1 = v = 0.0
    for i, (g, keep) in enumerate(zip(grads, keeps, strict=True)):
        t, lam = i + 1, DECAY * min(1.0, i / ramp) if ramp else DECAY
        w = w - LR * 0.1 * w  # weight decay
        pull = 0.0 if keep else lam * w
        if form == "gradient":
            m1 = BETAS[0] * m1 + (1 - BETAS[0]) * (g + pull)
            u, squared = m1, (g + pull) ** 2
        else:
            m1 = BETAS[0] * m1 + (1 - BETAS[0]) * g
            u = m1 + pull
            squared = u**2
        v = BETAS[1] * v + (1 - BETAS[1]) * squared
        denominator = math.sqrt(v / (1 - BETAS[1] ** t)) + EPS
        w = w - LR / (1 - BETAS[0] ** t) * u / denominator
    return w


@pytest.mark.parametrize("form", ["denominator", "gradient"])
@pytest.mark.parametrize("ramp", [0, 4])
def test_steps_follow_the_formulas(form, ramp):
    weight, mask, optimizer = setting(form, ramp)
    start, grads, keeps = weight.detach().clone(), gradients(7), []
    for i, grad in enumerate(grads):
        keeps.append(mask.mask_OI.clone())
        weight.grad = grad.clone()
        optimizer.step()
        if i == 3:
            mask.pick(weight)  # a mask that changes while it trains
    assert not torch.equal(keeps[0], keeps[-1])
    for place in [(r, c) for r in range(3) for c in range(8)]:
        history = [bool(k[place]) for k in keeps], [float(g[place]) for g in grads]
        wanted = by_hand(float(start[place]), *history, form, ramp)
        assert weight[place].item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("form", ["denominator", "gradient"])
def test_the_pull_shrinks_masked_weights_and_leaves_the_others(form):
    weight, mask, optimizer = setting(form, ramp=0, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 1e-4  # small enough that no weight passes zero
    keep = mask.mask_OI
    for _ in range(20):
        before = weight.detach().clone()
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert torch.equal(weight[keep], before[keep])
        assert bool((weight[~keep].abs() < before[~keep].abs()).all())
        assert bool((weight[~keep].sign() == before[~keep].sign()).all())


def test_the_first_step_of_a_ramp_does_not_pull():
    weight, _, optimizer = setting("denominator", ramp=4, weight_decay=0.0)
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


def test_it_is_adamw_without_masks_and_with_the_pull_in_the_gradient():
    for masked in (False, True):
        weight, mask, optimizer = setting("gradient", ramp=0)
        if not masked:
            optimizer.masks = {}
        twin = nn.Parameter(weight.detach().clone())
        peer = torch.optim.AdamW([twin], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.1)
        for grad in gradients(6):
            weight.grad, twin.grad = grad.clone(), grad.clone()
            if masked:
                decayed = twin.detach() * (1 - LR * 0.1)
                twin.grad += DECAY * decayed * ~mask.mask_OI
            optimizer.step()
            peer.step()
            torch.testing.assert_close(weight, twin, rtol=1e-12, atol=0)


def test_its_state_goes_through_a_snapshot(tmp_path):
    runs = []
    for stop in (None, 3):
        weight, _, optimizer = setting("denominator", dtype=torch.float32)
        for i, grad in enumerate(gradients(6, torch.float32)):
            if i == stop:
                kept = State(i, {"w": weight.detach()}, optimizer.state_dict(), {})
                write_snapshot(tmp_path, kept)
                weight, _, optimizer = setting("denominator", dtype=torch.float32)
                found = read_snapshot(tmp_path)
                weight.data.copy_(found.weights["w"])
                optimizer.load_state_dict(found.optimizer)
            weight.grad = grad.clone()
            optimizer.step()
        runs.append(weight.detach())
    assert torch.equal(*runs)


def test_a_masked_linear_has_the_dense_gradient_at_the_masked_weight():
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 5), torch.randn(7, 8)
    start = linear.weight.detach().clone()
    mask = Masked(linear.weight, "2:4", 0.5)
    dense = mask_weight(linear, mask)
    linear(x).square().sum().backward()
    assert torch.equal(dense, start)
    held = (start * mask.mask_OI).requires_grad_()
    nn.functional.linear(x, held, linear.bias).square().sum().backward()
    torch.testing.assert_close(dense.grad, held.grad)
    assert bool((dense.grad[~mask.mask_OI] != 0).all())
    make_hard(linear)
    assert torch.equal(linear.weight, held) and type(linear) is nn.Linear
    assert not torch.signbit(linear.weight[~mask.mask_OI]).any()


def test_a_pick_counts_the_entries_that_changed():
    weight = torch.tensor([[4.0, 3, 2, 1], [1, -2, 3, -4]])
    mask = Masked(weight, "2:4", 0.5)
    assert mask.mask_OI.tolist() == [[True, True, False, False], [False, False, True, True]]
    weight[0, 3] = -9.0
    assert int(mask.pick(weight)) == 2
    assert mask.mask_OI.tolist() == [[True, False, False, True], [False, False, True, True]]
    assert int(mask.pick(weight)) == 0
