"""QSD on pico transformers: what it leaves, its loss, a killed run, and what it refuses."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy, kl_div

from compressor.distill import ce
from compressor.distill.relations import outputs_kept, relation_loss, relation_modules
from compressor.distill.runner import run as train
from compressor.errors import CompressError
from compressor.model.checkpoint import load_directory
from compressor.model.forward import outputs
from compressor.model.layers import QuantLinear
from compressor.model.qsd_convert import make_spiking
from compressor.model.qsd_cost import vit_products
from compressor.model.qsd_layers import Line, Neuron
from compressor.model.saving import save
from compressor.quantize import qsd
from compressor.training.options import Train
from families import pico, sparse
from interrupted import Stopped, stopping
from spiking import images, spiking, with_images

SHORT = {"steps": 3, "batch": 4, "lr": 3e-3, "warmup": 1, "precision": "float32"}


def options(train=None, **changes):
    return qsd.Options(train=Train(**SHORT | (train or {})), **changes)


def source(backbone, seed=0):
    """A float network to start from, and its like as a teacher."""
    return pico("vit", seed=seed) if backbone == "a ViT" else spiking(backbone, levels=None)


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("backbone", ["a ViT", "vit", "stages"])
def test_what_is_left_is_quantized_and_reloads_exactly(backbone, bits, make_work, tmp_path):
    model = source(backbone)
    work = with_images(make_work(source(backbone)), model)
    qsd.run(model, options(bits=bits, time_steps=2), work)
    matrices = [m for m in model.module.modules() if isinstance(m, torch.nn.Linear)]
    tables = {n: m for n, m in model.module.named_modules() if isinstance(m, QuantLinear)}
    assert not matrices and tables.keys() == model.formats.keys()
    for name, form in model.formats.items():
        assert (form.bits, form.group, form.symmetric) == (bits, None, True)
        assert int(tables[name].codes_OI.max()) < 2**bits
    neurons = [m for m in model.module.modules() if isinstance(m, Neuron)]
    assert neurons and all(isinstance(m.norm, Line) for m in neurons)
    wanted = outputs(model, images(model))["logits"]
    save(model, tmp_path, tmp_path)
    assert (tmp_path / "packed.safetensors").is_file()
    loaded = load_directory(tmp_path, model.formats)
    assert torch.equal(outputs(loaded, images(model))["logits"], wanted)
    assert (loaded.config.time_steps, loaded.config.levels) == (2, 4)


@pytest.mark.parametrize("weights", [(1.0, 0.5, 0.3), (1.0, 0.0, 0.0), (0.0, 0.0, 2.0)])
def test_the_loss_is_its_three_terms(weights):
    model, teacher = pico("vit"), pico("vit", seed=1)
    make_spiking(model, 1, 4, False)
    batch = images(model)
    named = dict(zip(("ce", "logits", "relations"), weights, strict=True))
    with torch.no_grad():
        value = float(qsd.objective(options(**named), model, teacher)(batch))
        pixels = {"pixel_values": batch["pixel_values"]}
        with outputs_kept(relation_modules(model)) as own:
            logits = model.module(**pixels).logits
        with outputs_kept(relation_modules(teacher)) as above:
            wanted = teacher.module(**pixels).logits
        soft = [(z / 2).log_softmax(-1) for z in (logits, wanted)]
        terms = (
            cross_entropy(logits, batch["labels"]),
            4 * kl_div(*soft, log_target=True, reduction="batchmean"),
            relation_loss(own, above, len(logits)),
        )
    assert len(own) == 9
    expected = sum(weight * float(term) for weight, term in zip(weights, terms, strict=True))
    assert value == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_loss_and_notes_say_what_a_network_costs(make_work):
    model = pico("vit")
    work = with_images(make_work(pico("vit")), model)
    before = vit_products(model.config)
    qsd.run(model, options({"steps": 40}, relations=0.3), work)
    found = model.notes["validation"]
    assert found["after"] < found["before"]
    assert found["parts"].keys() == {"ce", "logits", "relations"}
    spikes = model.notes["spikes"]
    assert spikes["float_energy_nj"] == pytest.approx(4.6 * before / 1000)
    assert spikes["energy_nj"] == pytest.approx((4.6 * spikes["mac"] + 0.9 * spikes["ac"]) / 1000)
    assert 0 < spikes["energy_nj"] < spikes["float_energy_nj"]
    assert set(spikes["entropy"]) == {"q", "k", "v"} and spikes["entropy"]["q"] > 0
    assert spikes["untrained"]["entropy"].keys() == spikes["entropy"].keys()
    assert spikes["untrained"]["entropy"] != spikes["entropy"]
    json.dumps(model.notes)


def test_a_killed_run_goes_on_with_the_same_bits(make_work):
    """The statistics of norms, which move while it trains, are part of a snapshot."""
    wanted, results, log = options({"steps": 6, "snapshot_seconds": 0}), [], []
    for stop in (None, 4):
        torch.manual_seed(0)
        model = pico("vit")
        work = with_images(make_work(pico("vit", seed=1), log=log), model)
        if stop is not None:
            shifted = stopping(work, stop)
            settled = work._batches  # settling reads train batches too, and is not to be stopped
            real = shifted._batches
            object.__setattr__(
                shifted,
                "_batches",
                lambda split, n, **s: (settled if n == 16 else real)(split, n, **s),  # noqa: B023
            )
            with pytest.raises(Stopped):
                qsd.run(model, wanted, shifted)
            torch.manual_seed(77)
            model = pico("vit")
        qsd.run(model, wanted, work)
        results.append(model)
        shutil.rmtree(work.scratch)
    assert "resuming after step 4" in log
    first, second = (m.module.state_dict() for m in results)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_float_spiking_network_learns_by_distill_ce(make_work):
    """Its norms follow the batches in the one loop, and are left alone afterwards."""
    model = spiking("stages", levels=None)
    before = model.module.qsd.layers[0].neuron_before.norm.running_mean.clone()
    chosen = ce.Options(train=Train(**SHORT | {"steps": 20}))
    train(model, ce.objective(chosen, model, None), chosen, with_images(make_work(), model))
    after = model.module.qsd.layers[0].neuron_before.norm.running_mean.clone()
    assert not torch.equal(before, after)
    model.module(pixel_values=images(model)["pixel_values"])
    assert torch.equal(model.module.qsd.layers[0].neuron_before.norm.running_mean, after)


@pytest.mark.parametrize(
    "changes",
    [
        *({"levels": 0}, {"time_steps": 0}, {"levels": 17}, {"bits": 1}, {"bits": 9}),
        {"ce": 0.0, "logits": 0.0, "relations": 0.0},
    ],
)
def test_impossible_options_are_refused(changes):
    with pytest.raises(ValidationError):
        options(**changes)


@pytest.mark.parametrize("name", ["bert", "llama", "whisper", "deit"])
def test_other_models_are_refused_with_what_is_supported(name):
    with pytest.raises(CompressError, match=f"this is a {name} model") as caught:
        qsd.objective(options(), pico(name), pico(name))
    assert "vit or qsd_transformer" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers 2"),
        ({"patch_size": 8}, "patch_size 8"),
        ({"image_size": 32}, "image_size 32"),
        ({"num_labels": 7}, "7 classes"),
    ],
)
def test_a_teacher_that_does_not_match_is_refused(changes, said):
    with pytest.raises(CompressError, match=said):
        qsd.objective(options(), pico("vit"), pico("vit", **changes))


def test_without_relations_a_teacher_may_have_another_depth():
    assert qsd.objective(options(relations=0.0), pico("vit"), pico("vit", num_hidden_layers=2))


def test_a_bare_vit_and_zeros_of_an_earlier_stage_are_refused():
    with pytest.raises(CompressError, match="feature-extraction"):
        qsd.objective(options(), pico("vit", head=False), pico("vit"))
    with pytest.raises(CompressError, match="zeros of an earlier stage"):
        qsd.objective(options(), sparse(pico("vit")), pico("vit"))


def test_images_without_labels_are_refused(make_work):
    model, teacher = pico("vit"), pico("vit")
    batch = images(model)
    del batch["labels"]
    make_spiking(model, 1, 4, False)
    with pytest.raises(CompressError, match="needs labelled rows"):
        qsd.objective(options(), model, teacher)(batch)
