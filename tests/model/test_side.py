"""Side paths: they compute S X x, travel with their model, and say so when they cannot."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.distill import ce, runner
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError
from compressor.export import onnx, safetensors
from compressor.export.onnx_twin import make_twin
from compressor.model.checkpoint import load_directory
from compressor.model.count import count_nonzero, count_parameters
from compressor.model.forward import output_mask, outputs
from compressor.model.probe import largest_difference, read_probe
from compressor.model.saving import save
from compressor.model.side import Side, SideLinear, attach, drop_sides, sides, sides_off
from compressor.model.sources import deployed_bytes
from compressor.model.sparse import prunable
from compressor.quantize import rtn
from compressor.training.options import Train
from families import pico, random_inputs

K = 8


def with_sides(model, learned=True):
    """Random side paths at every Linear; every second one has a matrix X where some are learned."""
    torch.manual_seed(4)
    for i, (name, linear) in enumerate(prunable(model).items()):
        rank = linear.in_features // K
        project = torch.randn(rank, linear.in_features) if learned and i % 2 else None
        attach(model, name, Side(torch.randn(linear.out_features, rank) * 0.1, project))
    return model


def agree(first, second, batch, tolerance=1e-6):
    errors = largest_difference(outputs(first, batch), outputs(second, batch), output_mask(batch))
    return max(errors.values()) < tolerance


def test_a_side_path_adds_s_x_x():
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(12, 5), torch.randn(2, 3, 12)
    out, project = torch.randn(5, 3), torch.randn(3, 12)
    sums = torch.zeros(3, 12)
    for r in range(3):
        sums[r, 4 * r : 4 * r + 4] = 1
    for side, matrix in ((Side(out, project), project), (Side(out), sums)):
        linear = SideLinear(plain, side)
        assert linear.weight is plain.weight and linear.bias is plain.bias
        torch.testing.assert_close(linear(x), plain(x) + x @ (out @ matrix).T)


def test_side_paths_are_back_after_a_failure(pico_llama):
    model = with_sides(pico_llama())
    before = sides(model.module)
    with pytest.raises(RuntimeError), sides_off(model.module):
        assert not sides(model.module)
        raise RuntimeError
    assert sides(model.module) == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_it_is_saved_beside_the_weights_and_loaded_back(name, tmp_path):
    model = with_sides(pico(name))
    batch, rest = random_inputs(model), pico(name)
    save(model, tmp_path, tmp_path)
    loaded = load_directory(tmp_path, model.formats)
    assert agree(model, loaded, batch) and not agree(model, rest, batch, 1e-3)
    assert loaded.formats == model.formats
    first, second = model.module.state_dict(), loaded.module.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    extra = sum(t.numel() for t in load_file(tmp_path / "side.safetensors").values())
    assert count_parameters(loaded.module) == count_parameters(rest.module) + extra
    assert count_nonzero(loaded.module) >= count_nonzero(rest.module) + extra
    before = deployed_bytes(tmp_path)
    size = (tmp_path / "side.safetensors").stat().st_size
    (tmp_path / "side.safetensors").unlink()
    assert before - deployed_bytes(tmp_path) == size > 4 * extra
    without, report = type(rest.module).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert torch.equal(without.get_input_embeddings().weight, first_table(model))


def first_table(model):
    return model.module.get_input_embeddings().weight


def test_it_is_switched_off_and_dropped(pico_llama):
    model, plain = with_sides(pico_llama()), pico_llama()
    batch = random_inputs(plain)
    with sides_off(model.module):
        assert agree(model, plain, batch)
    assert not agree(model, plain, batch, 1e-3) and len(sides(model.module)) == 21
    assert drop_sides(model) == 21 and agree(model, plain, batch)
    assert not any(form.side_rank for form in model.formats.values())


def damage(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"about": "{}"})


def test_files_that_do_not_fit_are_refused(pico_llama, tmp_path):
    model = with_sides(pico_llama())
    save(model, tmp_path, tmp_path)
    file, kept = tmp_path / "side.safetensors", tmp_path / "kept"
    shutil.copy(file, kept)
    layer = "model.layers.0.self_attn.q_proj"
    wrong = {
        f"agree on '{layer}'": lambda t: t.pop(f"{layer}.out_OR"),
        f"side path of '{layer}'": lambda t: t.update({f"{layer}.out_OR": torch.ones(32, 3)}),
        "'lm_head'": lambda t: t.update({"lm_head.out_OR": torch.ones(96, 4)}),
        "which is no side path": lambda t: t.update({f"{layer}.strange": torch.ones(1)}),
    }
    for text, change in wrong.items():
        shutil.copy(kept, file)
        damage(file, change)
        with pytest.raises(CompressError, match=text):
            load_directory(tmp_path, model.formats)
    file.write_bytes(kept.read_bytes()[:2000])
    with pytest.raises(CompressError, match="truncated or damaged"):
        load_directory(tmp_path, model.formats)
    file.unlink()
    with pytest.raises(CompressError, match="misses side"):
        load_directory(tmp_path, model.formats)


@pytest.mark.parametrize("activation", ["none", "dynamic"])
def test_quantized_layers_carry_it(pico_llama, make_work, tmp_path, activation):
    model = with_sides(pico_llama())
    batch, first = random_inputs(model), sides(model.module)
    group = None if activation == "dynamic" else 16
    rtn.run(model, rtn.Options(group=group, activation=activation), make_work())
    assert sides(model.module) == first
    save(model, tmp_path, tmp_path)
    loaded = load_directory(tmp_path, model.formats)
    assert loaded.formats == model.formats and agree(model, loaded, batch)
    plain = pico_llama()
    rtn.run(plain, rtn.Options(group=group, activation=activation), make_work())
    drop_sides(loaded)
    assert agree(loaded, plain, batch)
    name, x = "model.layers.1.mlp.up_proj", torch.randn(2, 5, 32)
    served, bare = (make_twin(m).module.get_submodule(name) for m in (model, plain))
    torch.testing.assert_close(served(x) - bare(x), first[name](x), atol=1e-5, rtol=1e-5)


def test_onnx_files_hold_it(tmp_path):
    model = with_sides(pico("llama", num_hidden_layers=1))
    onnx.run(model, onnx.Options(), tmp_path)
    assert not (tmp_path / "side.safetensors").exists()
    engine = OnnxRuntimeEngine(tmp_path, threads=1)
    batch = random_inputs(model)
    given = outputs(model, batch)
    got = engine.outputs(batch)
    assert max(largest_difference(given, got, output_mask(batch)).values()) < 1e-5


@pytest.mark.parametrize("quantized", [False, True])
def test_dense_exports_keep_it_beside_or_drop_it(pico_llama, make_work, tmp_path, quantized):
    for side in ("keep", "drop"):
        model, out = with_sides(pico_llama()), tmp_path / side
        if quantized:
            rtn.run(model, rtn.Options(group=16), make_work())
        out.mkdir()
        manifest = safetensors.run(model, safetensors.Options(side=side), out).manifest
        ranks = {f.side_rank for f in manifest.formats.values()}
        assert ranks == ({4, 6} if side == "keep" else set())
        plain = AutoModelForCausalLM.from_pretrained(out).eval().requires_grad_(False)
        engine = TorchEngine(out)
        for inputs, wanted in read_probe(out):
            got, dropped = engine.outputs(inputs), {"logits": plain(**inputs).logits}
            mask = output_mask(inputs)
            assert max(largest_difference(wanted, got, mask).values()) < 1e-5
            without = max(largest_difference(wanted, dropped, mask).values())
            assert without > 1e-2 if side == "keep" else without < 1e-5


def test_later_training_moves_it(pico_llama, make_work):
    model = with_sides(pico_llama())
    before = {n: t.detach().clone() for n, t in model.module.named_parameters() if ".side." in n}
    wanted = ce.Options(train=Train(steps=2, batch=2, length=16, warmup=0, precision="float32"))
    runner.run(model, ce.objective(wanted, model, None), wanted, make_work())
    after = dict(model.module.named_parameters())
    assert len(before) == 31 and all(not torch.equal(after[n], before[n]) for n in before)
