"""The dense export is an ordinary Hugging Face checkpoint with the same function."""

import dataclasses

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from compressor.export import safetensors as export
from compressor.model.conv1d import to_linear
from compressor.model.forward import output_mask, outputs
from compressor.model.model import Pooling
from compressor.model.probe import largest_difference, read_probe
from compressor.quantize import rtn
from families import CONFIGS, pico


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_model_opens_in_transformers(pico_llama, make_work, tmp_path, tied):
    model = pico_llama(tie_word_embeddings=tied)
    rtn.run(model, rtn.Options(bits=4, group=16), make_work())
    artifact = export.run(model, export.Options(), tmp_path)
    assert artifact.engine == "torch"
    assert artifact.manifest.formats == {}
    assert artifact.manifest.metrics["dequantized_modules"] == len(model.formats)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for inputs, wanted in read_probe(tmp_path):
        assert torch.allclose(loaded(**inputs).logits, wanted["logits"], atol=1e-5)
        assert torch.allclose(outputs(model, inputs)["logits"], wanted["logits"], atol=1e-5)


def test_half_precision_probe_is_of_the_rounded_weights(pico_bert, tmp_path):
    model = pico_bert(pooling=Pooling("cls", False))
    export.run(model, export.Options(dtype="bfloat16"), tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    for inputs, wanted in read_probe(tmp_path):
        hidden = loaded(**inputs).last_hidden_state
        assert torch.allclose(hidden, wanted["last_hidden_state"], atol=1e-5)
        assert torch.equal(wanted["sentence_embedding"], wanted["last_hidden_state"][:, 0])
    assert model.module.dtype == torch.float32


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_opens_in_transformers_with_the_values_of_its_codes(name, make_work, tmp_path):
    model = pico(name)
    rtn.run(model, rtn.Options(bits=8, group=16, uneven="channel"), make_work())
    export.run(model, export.Options(), tmp_path)
    loaded, report = type(model.module).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    plain = dataclasses.replace(model, module=to_linear(loaded.eval()), formats={})
    for inputs, wanted in read_probe(tmp_path):
        errors = largest_difference(wanted, outputs(plain, inputs), output_mask(inputs))
        assert max(errors.values()) < 1e-5, errors
