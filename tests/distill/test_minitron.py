"""distill.minitron against its formula in float64, for every family, and what it refuses."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from compressor.distill import minitron
from compressor.errors import CompressError
from compressor.model.forward import accepted, outputs
from families import CONFIGS, pico, random_inputs
from predicting import labelled, scored


def hidden_states(model, batch):
    """States and masks of every stack, from a pass of its own."""
    given = accepted(model, batch)
    output = model.module(**given, output_hidden_states=True)
    if "decoder_hidden_states" in output:
        source = output.encoder_hidden_states
        masks = [batch.get("attention_mask"), batch["decoder_attention_mask"]]
        masks[0] = torch.ones(source[0].shape[:2]) if masks[0] is None else masks[0]
        return [source, output.decoder_hidden_states], [mask.bool() for mask in masks]
    states = output.hidden_states
    mask = batch.get("attention_mask", torch.ones(states[0].shape[:2]))
    return [states], [mask.bool()]


def divergence(student, teacher, batch):
    """Forward KL in float64, from whole logits."""
    s, t = (scored(model, batch)[0].log_softmax(-1) for model in (student, teacher))
    return (t.exp() * (t - s)).sum(-1).mean()


def distance(student, teacher, batch, pairs, lift=None):
    """L_is in float64: {stack: [(teacher state, student state)]}, one token after the other."""
    own, masks = hidden_states(student, batch)
    above, _ = hidden_states(teacher, batch)
    total = 0.0
    for stack, matched in pairs.items():
        for t, s in matched:
            real = [
                (own[stack][s][i, j].double(), above[stack][t][i, j].double())
                for i, j in masks[stack].nonzero().tolist()
            ]
            lifted = [(a if lift is None else lift.double() @ a, b) for a, b in real]
            total += sum(1 - cosine_similarity(a, b, dim=0) for a, b in lifted) / len(real)
    return total


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("llama", {0: [(0, 0), (1, 1)]}),
        ("bert", {0: [(0, 0), (1, 1)]}),
        ("vit", {0: [(0, 0), (1, 1)]}),
        ("t5", {0: [(0, 0), (1, 1)], 1: [(0, 0), (1, 1)]}),
        ("whisper", {0: [(0, 0), (1, 1)], 1: [(0, 0), (1, 1)]}),
    ],
)
def test_the_loss_is_the_formula(name, pairs):
    student, teacher = pico(name), pico(name, seed=1)
    batch = labelled(student)
    options = minitron.Options(intermediate="on", ce=0.3 if name == "llama" else 0.0)
    objective = minitron.objective(options, student, teacher)
    loss, parts = objective(batch), objective.parts
    kl, states = divergence(student, teacher, batch), distance(student, teacher, batch, pairs)
    assert parts["logits"].item() == pytest.approx(kl.item(), rel=1e-4)
    assert (parts["block output"] + parts["embeddings"]).item() == pytest.approx(
        states.item(), rel=1e-4
    )
    assert parts["alpha"].item() == pytest.approx((kl / states).item(), rel=1e-4)
    wanted = kl.item()  # alpha L_is has the same value and is left out
    if name == "llama":
        z, targets = scored(student, batch)
        ce = -z.log_softmax(-1)[range(len(z)), targets].mean().item()
        assert parts["ce"].item() == pytest.approx(ce, rel=1e-4)
        wanted += 0.3 * ce
    assert loss.item() == pytest.approx(wanted, rel=1e-4)


def test_alpha_gets_no_gradient():
    """With the ratio inside the graph, alpha L_is would be L_logits and its gradient another."""
    student, teacher = pico("llama"), pico("llama", seed=1)
    batch = labelled(student)
    weight = student.module.model.layers[0].mlp.up_proj.weight
    kl = divergence(student, teacher, batch)
    states = distance(student, teacher, batch, {0: [(0, 0), (1, 1)]})
    alpha = (kl / states).item()
    wanted = torch.autograd.grad(kl + alpha * states, weight, retain_graph=True)[0]
    attached = torch.autograd.grad(kl + kl / states * states, weight)[0]
    options = minitron.Options(intermediate="on")
    got = torch.autograd.grad(minitron.objective(options, student, teacher)(batch), weight)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(attached, wanted, rtol=1e-2, atol=1e-6)


def test_one_learned_map_lifts_a_narrow_student():
    student = pico("llama", hidden_size=16, num_hidden_layers=2)
    teacher = pico("llama", seed=1)
    batch = labelled(student)
    options = minitron.Options(layer_pair=(2, 1))
    objective = minitron.objective(options, student, teacher)
    assert {tuple(p.shape) for p in objective.parameters()} == {(32, 16)}
    objective(batch).backward()
    assert objective.lift.weight.grad.abs().sum() > 0
    wanted = distance(student, teacher, batch, {0: [(0, 0), (2, 1)]}, objective.lift.weight)
    got = objective.parts["block output"] + objective.parts["embeddings"]
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize(("above", "below", "on"), [(3, 2, True), (4, 3, False), (6, 4, True)])
def test_auto_is_on_from_a_third_fewer_layers(above, below, on):
    student, teacher = (pico("llama", num_hidden_layers=depth) for depth in (below, above))
    objective = minitron.objective(minitron.Options(), student, teacher)
    assert bool(objective.matched) == on
    objective(labelled(student))
    assert set(objective.parts) == (
        {"logits", "block output", "embeddings", "alpha"} if on else {"logits"}
    )
    if on:
        assert objective.matched[1] == (0, above - 2, max(1, below - 2))
    off = minitron.objective(minitron.Options(intermediate=False), student, teacher)  # YAML's off
    assert not off.matched and not list(off.parameters())


def test_each_backbone_runs_once():
    student, teacher, calls = pico("llama"), pico("llama", seed=1), []
    for model in (student, teacher):
        model.base.register_forward_hook(lambda module, *_: calls.append(module))
    objective = minitron.objective(minitron.Options(intermediate="on"), student, teacher)
    objective(labelled(student)).backward()
    assert calls == [student.base, teacher.base]
    assert all(p.grad is None for p in teacher.module.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_of_every_family_lower_the_loss(name):
    student, teacher = pico(name), pico(name, seed=1)
    objective = minitron.objective(minitron.Options(intermediate="on"), student, teacher)
    batch, losses = labelled(student), []
    optimizer = torch.optim.AdamW([*student.module.parameters(), *objective.parameters()], lr=1e-3)
    for _ in range(3):
        losses.append(objective(batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(bool(torch.isfinite(loss)) for loss in losses)
    assert losses[2] < losses[0]
    assert outputs(student, random_inputs(student))["logits"].isfinite().all()


def test_what_is_refused():
    llama = pico("llama")
    with pytest.raises(CompressError) as caught:
        minitron.objective(minitron.Options(), pico("bert", head=False), pico("bert", head=False))
    assert "distill.minitron needs a model that predicts" in caught.value.what
    assert "distill.latent" in caught.value.hint
    pair = minitron.Options(intermediate="on", layer_pair=(4, 1))
    with pytest.raises(CompressError, match=r"layer_pair \[4, 1\]: the teacher has layers 1 to 3"):
        minitron.objective(pair, llama, llama)
    with pytest.raises(CompressError, match="this model has two"):
        minitron.objective(pair, pico("t5"), pico("t5"))
    on, other = minitron.Options(intermediate="on"), pico("vit", patch_size=8)
    with pytest.raises(CompressError, match="patches of 4 pixels and the student of 8"):
        minitron.objective(on, other, pico("vit"))
    minitron.objective(minitron.Options(intermediate="off"), other, pico("vit"))
