"""quantize.awq and quantize.smoothquant as whole runs: planned, refused, run, exported, proven."""

import json

import pytest
import torch

import compressor
from compressor.errors import CompressError
from compressor.model.layers import QuantLinear
from compressor.run.loading import load_profile
from compressor.run.preflight import plan
from compressor.run.rehearse import rehearse
from compressor.run.setting import open_source
from compressor.run.verify import verify

DATA = {"samples": 8, "length": 16}
METHODS = {
    "quantize.awq": {"bits": 4, "group": 16, **DATA},
    "quantize.smoothquant": {"activation": "static", **DATA},
}


@pytest.fixture
def go(pico_llama, text_file, tmp_path):
    """Factory: run, or plan, a profile of these stages, by default on a Llama of one layer."""
    folder = tmp_path / "pico-llama"
    model = pico_llama(num_hidden_layers=1, tie_word_embeddings=True)
    model.module.save_pretrained(folder)
    model.processor.save_pretrained(folder)

    def start(*stages, do=compressor.run, name="out", data=str(text_file), model=folder):
        profile = tmp_path / "p.yaml"
        written = ", ".join(
            json.dumps({s: METHODS.get(s, {})} if isinstance(s, str) else s) for s in stages
        )
        profile.write_text(f"stages: [{written}]\nmeasures: []\n")
        return do(str(profile), str(model), out=tmp_path / name, data=data)

    return start


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_exported_and_verified(go, method):
    result = go(method, "export.onnx")
    model = result.checkpoint.load()
    inside = model.module.model.layers[0].mlp.down_proj
    assert isinstance(inside, QuantLinear)
    manifest = result.checkpoint.manifest
    found = manifest.formats["model.layers.0.mlp.down_proj"]
    if method == "quantize.awq":
        assert (found.bits, found.group, found.symmetric, found.activation) == (4, 16, False, None)
        assert len(manifest.metrics["notes"]["awq"]) == 7
    else:
        assert found.activation == {"bits": 8, "per": "tensor", "dynamic": False}
        assert float(inside.input_scale) != 1.0  # came back from disk
    served = result.artifacts[0]
    assert served.path.name == "02-export.onnx"
    assert verify(served.path)["ok"]


@pytest.mark.parametrize("method", METHODS)
def test_offload_gives_the_same_codes(go, method, tmp_path):
    found = []
    for offload in (False, True):
        stage = {method: METHODS[method] | {"offload": offload}}
        model = go(stage, name=str(offload)).checkpoint.load()
        found.append(model.module.state_dict())
        assert not list(tmp_path.glob(f"{offload}/.scratch/*"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(x, found[1][key]) for key, x in found[0].items())


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_has_numbers_and_missing_data_is_refused(go, method, tmp_path):
    (stage,) = go(method, do=plan)["stages"]
    assert stage["peak_memory_bytes"] > 10**8 and stage["seconds"] > 0
    assert 0 < stage["bytes_out"] < 4 * stage["parameters_out"]
    for do in (plan, compressor.run):
        with pytest.raises(CompressError, match=f"{method} needs data"):
            go(method, do=do, data=None)
    long = {method: METHODS[method] | {"length": 4000}}
    with pytest.raises(CompressError, match="length is 4000 and the model takes at most"):
        go(long, do=plan)
    assert not list((tmp_path / "out").glob("01*"))


def test_exponents_cost_time_in_the_plan(go):
    def seconds(alphas):
        stage = {"quantize.awq": {"bits": 4, "group": 16, "samples": 8, "alphas": alphas}}
        return go(stage, do=plan)["stages"][0]["seconds"]

    assert seconds(100_000) > seconds(1)


def test_what_cannot_be_smoothed_is_refused_or_said_before_the_work(go, pico_bert, tmp_path):
    folder = tmp_path / "pico-bert"
    model = pico_bert()
    model.module.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    refusing = {"quantize.smoothquant": {"unfolded": "refuse", **DATA}}
    with pytest.raises(CompressError, match=r"stages.1 \(quantize.smoothquant\): nothing can"):
        go(refusing, do=plan, model=folder)
    assert not list((tmp_path / "out").glob("01*"))
    said = []
    for stage in ("quantize.smoothquant", {"quantize.smoothquant": {"unfolded": "scale", **DATA}}):
        go(stage, do=plan, model=folder)
        said.append(rehearse(load_profile(tmp_path / "p.yaml"), open_source(str(folder))))
    assert "15 layers, 'encoder.layer.0.attention.self.query' the first" in said[0][0]
    assert not said[1]
    chain = [stage, "export.compressed_tensors"]
    with pytest.raises(CompressError, match="its inputs are multiplied at run time"):
        go(*chain, do=plan, model=folder)
