"""The profile vit-qsd on pico models, before any work: what is refused, and what a plan says."""

import numpy as np
import pytest
from PIL import Image

import compressor
from compressor.errors import CompressError
from compressor.model.qsd_convert import fold
from compressor.quantize import qsd
from families import pico
from spiking import spiking


@pytest.fixture
def stored(tmp_path):
    def write(model):
        folder = tmp_path / "model"
        model.module.save_pretrained(folder)
        return str(folder)

    return write


def pictures(folder):
    draw = np.random.default_rng(0)
    for name in ("a", "b", "c", "d", "e"):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return str(folder)


def test_a_plan(stored, tmp_path):
    found = compressor.plan("vit-qsd", stored(pico("vit")), data=pictures(tmp_path / "pictures"))
    assert found["fits"] and found["stages"][0]["name"] == "01-quantize.qsd"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_text_models_are_refused(name, stored):
    with pytest.raises(CompressError, match="vision transformers") as caught:
        compressor.plan("vit-qsd", stored(pico(name)))
    assert "quantize.distilled" in caught.value.hint


@pytest.mark.parametrize("key", ["levels", "time_steps"])
def test_no_levels_or_time_steps_are_refused_by_the_profile(key, stored):
    with pytest.raises(CompressError, match=key):
        compressor.plan("vit-qsd", stored(pico("vit")), set=[f"stages.1.{key}=0"])


def test_bits_that_onnx_runtime_lacks_are_refused(stored):
    with pytest.raises(CompressError, match="8, 4 and 2 bits"):
        compressor.plan("vit-qsd", stored(pico("vit")), set=["stages.1.bits=3"])


def test_a_folded_network_is_refused(stored):
    model = spiking()
    fold(model)
    with pytest.raises(CompressError, match="can be trained no more"):
        compressor.plan("vit-qsd", stored(model))


def test_images_without_labels_are_refused_before_any_work(stored, tmp_path):
    folder = tmp_path / "one"
    pictures(tmp_path / "some")
    folder.mkdir()
    for picture in (tmp_path / "some").rglob("*.png"):
        picture.rename(folder / f"{picture.parent.name}{picture.name}")
    with pytest.raises(CompressError, match="needs labelled rows") as caught:
        compressor.plan("vit-qsd", stored(pico("vit")), data=str(folder))
    assert "ce: 0 for quantize.qsd" in caught.value.hint
    compressor.plan("vit-qsd", stored(pico("vit")), data=str(folder), set=["stages.1.ce=0"])


def test_naming_one_option_of_train_keeps_its_rate():
    assert qsd.Options(train={"steps": 5}).train.lr == qsd.Options().train.lr == 2e-3


def test_other_stages_do_not_know_a_spiking_network(stored, tmp_path):
    profile = tmp_path / "cut.yaml"
    profile.write_text("name: cut\nstages:\n  - prune.minitron: {parameters: 0.5}\n")
    with pytest.raises(CompressError, match=r"prune.minitron.*layers of a qsd_transformer"):
        compressor.plan(profile, stored(spiking(levels=None)))
