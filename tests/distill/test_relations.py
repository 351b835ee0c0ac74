"""Relations of tokens against the formula in float64."""

import torch

from compressor.distill.relations import relation_loss, relation_modules
from families import pico


def test_the_loss_is_the_formula():
    draw = torch.Generator().manual_seed(0)
    own = [torch.randn(3, 5, width, generator=draw) for width in (8, 4)]
    above = [torch.randn(3, 5, 6, generator=draw) for _ in range(2)]
    total = 0.0
    for x, y in zip(own, above, strict=True):
        for image in range(3):
            grams = [m[image].double() @ m[image].double().T for m in (x, y)]
            first, second = (gram / gram.square().sum().sqrt() for gram in grams)
            total += float((first - second).square().sum().sqrt()) / 3
    torch.testing.assert_close(float(relation_loss(own, above, 3)), total, rtol=1e-5, atol=0)


def test_time_steps_count_as_their_mean():
    x = torch.randn(2, 4, 6)
    assert float(relation_loss([torch.cat([x + 1, x - 1])], [x], 2)) < 1e-5
    assert float(relation_loss([torch.cat([x + 1, x + 1])], [x], 2)) > 0.01


def test_a_teacher_may_have_other_time_steps():
    x = torch.randn(2, 4, 6)
    own, above = torch.cat([x + 1, x - 1]), torch.cat([x, x + 2, x - 2])
    assert float(relation_loss([own], [above], 2)) < 1e-5


def test_relations_do_not_change_with_the_size_of_activations():
    x, y = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    torch.testing.assert_close(relation_loss([5 * x], [y], 2), relation_loss([x], [y], 2))


def test_modules_are_q_k_and_v_of_every_layer():
    vit = pico("vit")
    blocks = vit.module.vit.layers
    wanted = [
        m for b in blocks for m in (b.attention.q_proj, b.attention.k_proj, b.attention.v_proj)
    ]
    assert relation_modules(vit) == wanted
