"""Bytes of quantized weight files, known before a weight is read."""

import pytest
import torch
import transformers

from compressor.errors import CompressError
from compressor.model.families import find_family
from compressor.model.model import Model
from compressor.model.saving import save
from compressor.model.shapes import empty_model
from compressor.quantize import distilled, nf4, rtn, smoothquant
from compressor.quantize.planned import planned
from compressor.quantize.weights import Mixed
from compressor.run.quantized_size import quantized_bytes
from families import CONFIGS, pico, random_inputs

FLOAT_TABLES = {"embeddings": False, "head": False}


def weightless(model):
    return Model(empty_model(type(model.module), model.config), model.family, None)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *((rtn, {"bits": bits, "group": 16}) for bits in (8, 4, 3, 2)),
        (rtn, {"bits": 4, "group": None}),
        (rtn, {"bits": 3, "group": 32, "uneven": "channel"}),
        (rtn, {"bits": 8, "group": 16, "symmetric": False}),
        (rtn, {"bits": 2, "group": 16, "symmetric": False}),
        (rtn, {"bits": 4, "group": 16, **FLOAT_TABLES}),
        (rtn, {"bits": 4, "group": 16, "table_bits": 8}),
        (rtn, {"bits": 8, "group": None, "activation": "token"}),
        (rtn, {"bits": 8, "group": None, "activation": "token", "table_bits": 4}),
        (nf4, {"group": 16}),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_predicted_is_written(
    pico_llama, make_work, tmp_path, method, settings, tied, dtype
):
    model = pico_llama(tie_word_embeddings=tied)
    options = method.Options(**settings)
    predicted = quantized_bytes(weightless(model), options, getattr(torch, dtype))
    plan = planned(weightless(model), options)
    method.run(model, options, make_work())
    assert plan.exact and plan.choices == [model.formats]
    model.source_dtype = dtype
    save(model, tmp_path, tmp_path)
    written = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert [predicted] == written


@pytest.mark.parametrize(
    ("family", "suffix", "heads"),
    [
        ("bert", "ForSequenceClassification", ["classifier"]),
        ("roberta", "ForSequenceClassification", ["classifier.out_proj"]),
        ("distilbert", "ForSequenceClassification", ["classifier"]),
        ("llama", "ForSequenceClassification", ["score"]),
        ("vit", "ForImageClassification", ["classifier"]),
        ("deit", "ForImageClassification", ["classifier"]),
        (
            *("deit", "ForImageClassificationWithTeacher"),
            ["cls_classifier", "distillation_classifier"],
        ),
    ],
)
def test_the_last_layer_of_a_classifier_may_stay_float(family, suffix, heads, make_work):
    config_class, values, _ = CONFIGS[family]
    config = getattr(transformers, config_class)(**values | {"num_labels": 5})
    made = getattr(transformers, config_class.removesuffix("Config") + suffix)(config)
    model = Model(made, find_family(family), None)
    options = rtn.Options(bits=4, group=None, head=False)
    plan = planned(weightless(model), options)
    rtn.run(model, options, make_work())
    assert [n for n, m in made.named_modules() if isinstance(m, torch.nn.Linear)] == heads
    assert plan.exact and plan.choices == [model.formats]


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_factors_of_inputs_count(name, make_work, tmp_path):
    model, work = pico(name), make_work()
    object.__setattr__(work, "_batches", lambda split, n, **shape: [random_inputs(model, rows=4)])
    options = smoothquant.Options(samples=4, length=16, unfolded="scale")
    predicted = quantized_bytes(weightless(model), options, torch.float32)
    plan = planned(weightless(model), options)
    smoothquant.run(model, options, work)
    assert plan.exact and plan.choices == [model.formats]
    save(model, tmp_path, tmp_path)
    assert [predicted] == [file.stat().st_size for file in tmp_path.glob("*.safetensors")]


@pytest.mark.parametrize("stored", [True, False])
def test_a_pooler_counts_where_it_is_stored(pico_bert, make_work, tmp_path, stored):
    model, options = pico_bert(), rtn.Options(bits=4, group=16)
    if not stored:
        model.module.pooler = None
    names = model.module.state_dict().keys()
    empty = weightless(pico_bert())
    predicted = quantized_bytes(empty, options, torch.float32, stored=names)
    rtn.run(model, options, make_work())
    save(model, tmp_path, tmp_path)
    assert (tmp_path / "packed.safetensors").stat().st_size == predicted


def test_what_weights_decide_is_not_predicted(pico_llama):
    model = weightless(pico_llama())
    mixed = rtn.Options(group=16, mixed=Mixed(average_bits=4))
    learned = distilled.Options(bits=4, bucket="flat", group=256)
    for options in (mixed, learned):
        assert quantized_bytes(model, options, torch.float32) is None
    assert [{f.bits for f in c.values()} for c in planned(model, mixed).choices] == [{2}, {4}, {8}]
    assert {f.codebook for f in planned(model, learned).choices[0].values()} == {"learned"}


def test_only_one_of_a_tied_pair_is_refused(pico_llama):
    model = weightless(pico_llama(tie_word_embeddings=True))
    with pytest.raises(CompressError, match="share one table"):
        planned(model, rtn.Options(embeddings=False, group=16))
