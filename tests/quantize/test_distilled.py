"""Quantized distillation on pico models: what it leaves, what it refuses, and a killed run."""

import json
import math
import shutil

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy, kl_div

from compressor.errors import CompressError
from compressor.model import layers
from compressor.model.forward import outputs
from compressor.model.layers import QuantEmbedding, QuantLinear
from compressor.model.manifest import WeightFormat
from compressor.model.saving import save
from compressor.model.sparse import broken_promise, prunable
from compressor.model.stored import quantized_state
from compressor.numerics.buckets import Buckets
from compressor.prune import magnitude, minitron
from compressor.quantize import distilled, rtn
from compressor.quantize.sizes import sizes
from compressor.training.options import Train
from families import pico, sparse
from interrupted import Stopped, stopping

FLOAT_ENDS = {"embeddings": False, "head": False}
SHORT = {"batch": 4, "length": 16, "lr": 3e-3, "warmup": 1, "precision": "float32"}
BATCH = {
    "input_ids": torch.arange(5, 25).reshape(2, 10),
    "attention_mask": torch.ones(2, 10, dtype=torch.long),
}
KINDS = {
    "group": {"group": 16},
    "asymmetric": {"group": 16, "symmetric": False},
    "learned": {"group": 16, "steps": "learned", "step_lr": 1e-2},
    "flat": {"bucket": "flat", "group": 256},
    "absmax": {"bucket": "flat", "group": 64, "scaling": "absmax"},
    "unbucketed": {"bucket": "flat", "group": None},
    "exact": {"group": 16, "backward": "exact"},
    "stochastic": {"bucket": "flat", "group": 256, "rounding": "stochastic"},
}


def options(count=3, train=None, **changes):
    changes = {"bits": 4, **changes}
    return distilled.Options(train=Train(**SHORT | {"steps": count} | (train or {})), **changes)


@pytest.mark.parametrize(("kind", "tied"), [*((kind, True) for kind in KINDS), ("learned", False)])
def test_what_is_left_is_quantized_reloads_exactly_and_was_what_validation_saw(
    kind, tied, pico_llama, make_work
):
    settings = {"tie_word_embeddings": tied}
    model, work = pico_llama(**settings), make_work(pico_llama(**settings))
    wanted = options(**KINDS[kind])
    distilled.run(model, wanted, work)
    for layer in prunable(pico_llama()):
        assert isinstance(model.module.get_submodule(layer), QuantLinear)
        form = model.formats[layer]
        assert form.bits == 4 and form.flat == (wanted.bucket == "flat")
    head, table = model.module.lm_head, model.module.get_input_embeddings()
    assert isinstance(table, QuantEmbedding) and (head.codes_OI is table.codes_OI) == tied
    fresh = pico_llama(seed=1, **settings)
    layers.install(fresh.module, model.formats)
    state = quantized_state(model.module, torch.float32)
    layers.state_from_disk(fresh.module, {name: lazy.make() for name, lazy in state.items()})
    assert torch.equal(outputs(fresh, BATCH)["logits"], outputs(model, BATCH)["logits"])
    loss = distilled.objective(wanted, model, work.teacher)
    with torch.no_grad():
        values = [loss(batch).item() for batch in work.batches("validation", None)]
    noted = model.notes["validation"]
    assert noted["after"] == pytest.approx(sum(values) / len(values), rel=1e-6)


def test_before_is_the_loss_of_rounding_alone(pico_llama, make_work):
    model, work = pico_llama(), make_work(pico_llama())
    distilled.run(model, options(1, group=16), work)
    rounded = pico_llama()
    rtn.run(rounded, rtn.Options(bits=4, group=16), make_work())
    loss = distilled.objective(options(), rounded, work.teacher)
    with torch.no_grad():
        values = [loss(batch).item() for batch in work.batches("validation", None)]
    before = model.notes["validation"]["before"]
    assert before == pytest.approx(sum(values) / len(values), rel=1e-6)


def test_training_beats_rounding(pico_llama, make_work):
    model, wanted = pico_llama(), options(40, bits=2, group=16, symmetric=False, ce=0.0)
    distilled.run(model, wanted, make_work(pico_llama()))
    noted = model.notes["validation"]
    assert noted["after"] < 0.8 * noted["before"]


@pytest.mark.parametrize(("head", "temperature"), [("sequence-classification", 2), (None, 1)])
def test_the_loss_is_that_of_the_paper(head, temperature, pico_bert, pico_llama, make_work):
    """0.7 T^2 KL + 0.3 CE, T = 2 for classes; KL is a mean over samples, not elements."""
    build = pico_llama if head is None else lambda seed: pico_bert(head, seed=seed)
    model, teacher = build(seed=0), build(seed=1)
    batch = make_work().batches("train", 1)[0]
    if head is not None:
        batch["labels"] = torch.tensor([0, 1, 1, 0])
    value = distilled.objective(options(group=16), model, teacher)(batch).item()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        own, above = (m.module(**inputs).logits for m in (model, teacher))
    labels = batch["labels"]
    if head is None:
        real = batch["attention_mask"].bool()
        real = real[:, 1:] & real[:, :-1]
        own, above, labels = own[:, :-1][real], above[:, :-1][real], batch["input_ids"][:, 1:][real]
    soft = [(z / temperature).log_softmax(-1) for z in (own, above)]
    kl = kl_div(*soft, log_target=True, reduction="batchmean") * temperature**2
    assert value == pytest.approx(float(0.7 * kl + 0.3 * cross_entropy(own, labels)), rel=1e-5)


BUCKETS = [{"group": 16}, {"bucket": "flat", "group": 64}]


@pytest.mark.parametrize("bucket", BUCKETS)
def test_random_rounding_trains_with_weights_that_are_right_on_average(
    bucket, pico_llama, make_work
):
    """With weights that do not move, what the loss sees is a new draw around them each step."""
    model, draws = pico_llama(num_hidden_layers=1), []
    layer = model.module.model.layers[0].mlp.up_proj
    w = layer.weight.detach().clone()
    layer.register_forward_pre_hook(
        lambda m, _: draws.append(m.weight.detach()) if torch.is_grad_enabled() else None
    )
    wanted = options(60, {"lr": 1e-12}, bits=3, rounding="stochastic", **bucket)
    distilled.run(model, wanted, make_work(pico_llama()))
    left = model.module.model.layers[0].mlp.up_proj.weight
    assert len(draws) == 60 and not torch.equal(draws[0], draws[1])
    # not nearly zero: the largest weight of a symmetric group may lie beyond the grid
    assert float((torch.stack(draws).mean(0) - w).norm()) < 0.5 * float((left - w).norm())


@pytest.mark.parametrize("bucket", BUCKETS)
def test_the_backward_pass_is_the_one_asked_for(bucket, pico_llama, make_work):
    """truncated: none beyond [-1, 1]. exact: other than plain at the ends of a bucket alone."""
    found = {}
    for backward in ("plain", "truncated", "exact"):
        model, work = pico_llama(), make_work(pico_llama())
        layer = model.module.model.layers[0].mlp.up_proj
        layer.weight.data *= 4
        w = layer.weight.detach().clone()
        layer.weight.register_hook(lambda g, of=backward: found.update({of: g.clone()}))
        distilled.run(model, options(1, {"lr": 1e-12}, backward=backward, **bucket), work)
        left = model.module.model.layers[0].mlp.up_proj.weight
        assert (float(left.abs().max()) < 1.001) == (backward == "truncated")
        shutil.rmtree(work.scratch)
    assert torch.equal(found["truncated"] == 0, w.abs() > 1)
    cut, own = (x.view(-1, bucket["group"]) for x in (w, found["exact"] - found["plain"]))
    ends = [cut.argmax(1), cut.argmin(1)] if "bucket" in bucket else [cut.abs().argmax(1)]
    rest = own.clone()
    for end in ends:
        assert float(own.gather(1, end[:, None]).abs().median()) > 1e-5
        rest.scatter_(1, end[:, None], 0.0)
    assert float(rest.abs().max()) < 1e-6


def test_buckets_save_two_bits_from_collapse(pico_llama, make_work):
    """A few large weights stretch the one scale of a tensor; of a bucket they spoil little."""

    def with_outliers():
        model = pico_llama()
        for linear in prunable(model).values():
            linear.weight.data[0, 0] = 20 * linear.weight.data.abs().max()
        return model

    losses = {}
    for group in (None, 16):
        model, work = with_outliers(), make_work(with_outliers())
        distilled.run(model, options(20, bits=2, bucket="flat", group=group), work)
        losses[group] = model.notes["validation"]
        used = [model.module.get_submodule(n).weight.unique() for n in prunable(with_outliers())]
        assert (max(map(len, used)) <= 4) == (group is None)
        shutil.rmtree(work.scratch)
    assert losses[16]["before"] < losses[None]["before"]
    assert losses[16]["after"] < 0.9 * losses[None]["after"]


def test_each_bucket_has_at_most_four_values(pico_llama, make_work):
    model = pico_llama()
    distilled.run(model, options(bits=2, bucket="flat", group=256), make_work(pico_llama()))
    for name in prunable(pico_llama()):
        weight = model.module.get_submodule(name).weight
        buckets = Buckets(256, True, "linear").cut(weight)
        assert all(len(bucket.unique()) <= 4 for bucket in buckets)


@pytest.mark.parametrize("kind", ["asymmetric", "learned", "stochastic"])
def test_a_killed_run_goes_on_with_the_same_bits(kind, pico_llama, make_work):
    wanted = options(6, {"snapshot_seconds": 0}, **KINDS[kind])
    results, log = [], []
    for stop in (None, 4):
        torch.manual_seed(0)
        model = pico_llama(tie_word_embeddings=True)
        work = make_work(pico_llama(tie_word_embeddings=True), log=log)
        if stop is not None:
            with pytest.raises(Stopped):
                distilled.run(model, wanted, stopping(work, stop))
            torch.manual_seed(77)  # another process, another random state
            torch.rand(5)
            model = pico_llama(tie_word_embeddings=True)
        distilled.run(model, wanted, work)
        results.append(model)
        shutil.rmtree(work.scratch)
    assert "resuming after step 4" in log
    first, second = (m.module.state_dict() for m in results)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert results[0].notes["validation"] == results[1].notes["validation"]


@pytest.mark.parametrize("kind", ["group", "asymmetric", "learned", "absmax"])
def test_zeros_of_an_earlier_stage_stay_zeros(kind, pico_llama, make_work):
    model = sparse(pico_llama())
    gone = {name: linear.weight == 0 for name, linear in prunable(model).items()}
    before = dict(model.formats)
    distilled.run(model, options(8, **KINDS[kind]), make_work(pico_llama()))
    assert not broken_promise(model, before) and not broken_promise(model, model.formats)
    for name, zeros in gone.items():
        assert not model.module.get_submodule(name).weight[zeros].any()
        assert model.formats[name].pattern == "2:4"


def test_linear_scaling_is_refused_where_zeros_are_promised(pico_llama, make_work):
    model = pico_llama()
    magnitude.run(model, magnitude.Options(sparsity=0.5), make_work())
    with pytest.raises(CompressError, match="linear scaling has no point at 0") as caught:
        distilled.run(model, options(bucket="flat"), make_work(pico_llama()))
    assert caught.value.hint == "scaling: absmax"


def test_a_smaller_student_learns_from_the_whole_model(pico_llama, make_work):
    model, work = pico_llama(), make_work(pico_llama())
    cut = minitron.Options(sizes={"layers": 2, "mlp": 32}, samples=4, length=16)
    minitron.run(model, cut, work)
    distilled.run(model, options(20, group=16), work)
    assert model.notes["validation"]["after"] < model.notes["validation"]["before"]
    assert len(model.module.model.layers) == 2


@pytest.mark.parametrize("family", ["gpt2", "t5", "whisper", "bert"])
def test_ends_may_stay_float(family, make_work):
    model, teacher = pico(family), pico(family, seed=1)
    assert distilled.objective(options(group=16, **FLOAT_ENDS), model, teacher) is not None
    left = distilled.trained_targets(model, options(group=16, **FLOAT_ENDS))
    names = {name for target in left for name in target.names}
    assert set(prunable(model)) <= names
    assert all(isinstance(model.module.get_submodule(name), torch.nn.Linear) for name in names)
    head = model.module.get_output_embeddings()
    assert all(model.module.get_submodule(name) is not head for name in names)


def test_the_classifier_of_a_classifier_may_stay_float(pico_bert, make_work):
    found = [
        {
            n
            for t in distilled.trained_targets(pico_bert("sequence-classification"), o)
            for n in t.names
        }
        for o in (options(group=16), options(group=16, **FLOAT_ENDS))
    ]
    assert "classifier" in found[0] and "bert.pooler.dense" in found[1]
    gone = {
        "classifier",
        *(f"bert.embeddings.{k}_embeddings" for k in ("word", "position", "token_type")),
    }
    assert found[0] - found[1] == gone


def test_sizes_are_the_papers_and_the_files(pico_llama, make_work):
    model = pico_llama()
    distilled.run(model, options(bits=2, bucket="flat", group=256), make_work(pico_llama()))
    size, counts, weights, buckets = sizes(model), torch.zeros(256), 0, 0
    for name in model.formats:
        codes = model.module.get_submodule(name).codes_OI
        weights, buckets = weights + codes.numel(), buckets + math.ceil(codes.numel() / 256)
        counts += torch.bincount(codes.flatten(), minlength=256)
    shares = counts[counts > 0] / weights
    entropy = -float((shares * shares.log2()).sum())
    norms = 7 * 32
    assert (size["weights"], size["buckets"], size["float"]) == (weights, buckets, norms)
    assert size["bytes"] == 4 * norms + 2 * weights / 8 + 8 * buckets
    assert entropy <= size["huffman_bits"] <= entropy + 1
    assert size["huffman_bytes"] == pytest.approx(
        size["bytes"] - (2 - size["huffman_bits"]) * weights / 8
    )
    packed = weights // 4 + 4 * buckets + 16 * len(model.formats)  # 2 bits; two halves; points
    assert size["stored_bytes"] == packed + 4 * norms
    json.dumps(size)  # it becomes part of a manifest


@pytest.mark.parametrize("settings", [{"bits": 8, "symmetric": False}, {"bits": 3}])
def test_stored_bytes_are_those_of_the_layout_that_is_written(
    settings, pico_llama, make_work, tmp_path
):
    model = pico_llama(tie_word_embeddings=True)
    distilled.run(model, options(1, group=16, **settings), make_work(pico_llama()))
    save(model, tmp_path, tmp_path)
    name = "model.safetensors" if settings["bits"] == 8 else "packed.safetensors"
    content = (tmp_path / name).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert sizes(model)["stored_bytes"] == len(content) - header


def test_formats(pico_llama, make_work):
    for kind, form in {
        "asymmetric": {"group": 16, "symmetric": False},
        "learned": {"group": 16},
        "flat": {
            "group": 256,
            "symmetric": False,
            "codebook": "learned",
            "points": 16,
            "flat": True,
        },
        "absmax": {"group": 64, "codebook": "learned", "points": 15, "flat": True},
    }.items():
        model, work = pico_llama(), make_work(pico_llama())
        distilled.run(model, options(1, **KINDS[kind]), work)
        assert model.formats["model.layers.0.mlp.up_proj"] == WeightFormat(bits=4, **form)
        shutil.rmtree(work.scratch)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"scaling": "absmax"}, "scaling is for bucket: flat"),
        ({"bucket": "flat", "symmetric": False}, "bucket: flat has scaling"),
        ({"bucket": "flat", "steps": "learned"}, "needs bucket: group"),
        ({"bucket": "flat", "uneven": "channel"}, "uneven is for bucket: group"),
        ({"step_lr": 1e-2}, "step_lr is for steps: learned"),
        ({"steps": "learned", "backward": "exact"}, "a backward pass of its own"),
    ],
)
def test_options_that_contradict_each_other(wrong, what):
    with pytest.raises(ValidationError, match=what):
        options(**wrong)


def test_refusals(pico_llama, pico_bert, make_work):
    work = make_work(pico_llama())
    with pytest.raises(CompressError, match="128 does not divide the 32 inputs"):
        distilled.run(pico_llama(), options(), work)
    with pytest.raises(CompressError, match="predicts tokens or labels"):
        distilled.run(pico_bert(), options(group=16), work)
    with pytest.raises(CompressError, match="vocabulary"):
        distilled.run(pico_llama(vocab_size=64), options(group=16), work)
    model = pico_llama()
    model.module.model.layers[1].mlp.up_proj.weight.data[0, 0] = 5e4
    with pytest.raises(CompressError, match=r"up_proj' is so large that its scale overflows"):
        distilled.run(model, options(bucket="flat"), work)
    assert not model.formats
