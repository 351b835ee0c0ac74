"""The pooling of a sentence encoder is read from every version's files, or refused."""

import json

import pytest

from compressor.errors import CompressError
from compressor.model.model import Pooling
from compressor.model.pooling import fit_pooling, read_pooling


def write(folder, kinds, pooling=None):
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"a.b.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


NEW = {"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True}
OLD = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False}


@pytest.mark.parametrize(
    ("stated", "mode"),
    [
        (NEW, "mean"),
        (NEW | {"pooling_mode": ["cls"]}, "cls"),
        (OLD | {"pooling_mode_max_tokens": True}, "max"),
        (OLD | {"pooling_mode_cls_token": True}, "cls"),
    ],
)
def test_both_forms_of_the_config(tmp_path, stated, mode):
    folder = write(tmp_path, ["Transformer", "Pooling", "Normalize"], stated)
    assert read_pooling(folder) == Pooling(mode, normalize=True)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_what_sentence_transformers_writes_and_reads(tmp_path, mode):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    folder = write(tmp_path, ["Transformer", "Pooling"], {})
    modules.Pooling(16, mode).save(str(folder / "1_Pooling"))
    assert read_pooling(folder) == Pooling(mode, normalize=False)
    fit_pooling(folder, 8)
    again = modules.Pooling.load(str(folder / "1_Pooling"))
    assert (again.embedding_dimension, again.pooling_mode) == (8, mode)


@pytest.mark.parametrize(
    "stated",
    [
        NEW | {"pooling_mode": "lasttoken"},
        NEW | {"pooling_mode": ["mean", "cls"]},
        OLD,
        OLD | {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True},
        OLD | {"pooling_mode_weightedmean_tokens": True},
    ],
)
def test_modes_that_cannot_be_reproduced(tmp_path, stated):
    with pytest.raises(CompressError, match="none of mean, cls, max"):
        read_pooling(write(tmp_path, ["Transformer", "Pooling"], stated))


@pytest.mark.parametrize(
    "kinds",
    [
        ["Transformer", "Pooling", "Dense"],
        ["Transformer", "Pooling", "Dense", "Normalize"],
        ["Transformer", "WordWeights", "Pooling"],
        ["Transformer", "Normalize"],
    ],
)
def test_other_modules_are_refused(tmp_path, kinds):
    with pytest.raises(CompressError, match=", ".join(kinds)):
        read_pooling(write(tmp_path, kinds, NEW))


@pytest.mark.parametrize("text", ["{", "3", '["a"]', '[{"type": "Pooling"}]', '[{"type": 1}]'])
def test_a_damaged_listing(tmp_path, text):
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(CompressError, match=r"modules\.json is (malformed|not valid JSON)"):
        read_pooling(tmp_path)


def test_a_missing_or_damaged_config(tmp_path):
    assert read_pooling(tmp_path) is None
    write(tmp_path, ["Transformer", "Pooling"])
    with pytest.raises(CompressError, match="is missing"):
        read_pooling(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "1_Pooling").mkdir(exist_ok=True)
        (tmp_path / "1_Pooling" / "config.json").write_text(text)
        with pytest.raises(CompressError, match=r"config\.json is (malformed|not valid JSON)"):
            read_pooling(tmp_path)
