"""Pairs, images, clips and masked tokens: what becomes a document, a row, a batch, a sentence."""

import gzip
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    DeiTConfig,
    ViTConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperProcessor,
)

from compressor.errors import CompressError
from compressor.model.side_files import side_files
from compressor.training.audio import AudioPlan, audio_plan, features, resample
from compressor.training.data import DataSpec, load_corpus, make_batches
from compressor.training.images import image_plan, pixels
from compressor.training.masking import SHARE
from compressor.training.pairs import decoder_inputs
from compressor.training.reading import Reading, most_tokens, reading_of
from compressor.training.rows import Rows
from conftest import character_tokenizer, letter_tokenizer
from families import pico

VIT, T5, WHISPER, BERT = "image-classification", "seq2seq-lm", "speech-seq2seq", "fill-mask"
IMAGES = Reading("images", image=image_plan(pico("vit").config, {}))
PAIRS = Reading("pairs", start=0)


def batches_of(corpus, task, reading=None, processor=None, split="train", n=None, **shape):
    given = {"task": task, "seed": 0, "batch": 4, "length": 32} | shape
    if reading is not None:
        given["reading"] = reading
    return make_batches(corpus, processor, split, n, **given)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def folder(tmp_path):
    """Three classes of sixteen random coloured images each, of two sizes and two formats."""
    draw = np.random.default_rng(0)
    for name in ("cat", "ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(16):
            side = 16 if i % 2 else 20
            image = Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8))
            image.save(tmp_path / "images" / name / f"{i}.{'png' if i % 3 else 'jpg'}")
    return tmp_path / "images"


def test_folders_are_classes_in_alphabetical_order(folder):
    corpus = load_corpus(DataSpec([str(folder)]), VIT, "images")
    found = {d.media.path: d.label for docs in corpus.documents.values() for d in docs}
    assert len(found) == 48
    assert {path.parent.name: label for path, label in found.items()} == {
        "ant": 0,
        "bee": 1,
        "cat": 2,
    }
    splits = [{d.content for d in corpus.documents[s]} for s in ("train", "validation", "heldout")]
    assert sum(len(s) for s in splits) == 48 == len(set.union(*splits))


def test_folders_have_the_numbers_of_a_model_that_names_its_classes(folder, tmp_path):
    names = ["dog", "cat", "bee", "emu", "ant"]
    pico("vit", id2label=dict(enumerate(names))).config.save_pretrained(tmp_path)
    classes = reading_of(tmp_path).classes
    corpus = load_corpus(DataSpec([str(folder)]), VIT, "images", classes)
    for document in corpus.documents["train"]:
        assert names[document.label] == document.media.path.parent.name
    (folder / "bee").rename(folder / "wasp")
    wanted = "'images' has the class folders wasp, and the model has the classes dog, cat, bee"
    with pytest.raises(CompressError, match=wanted):
        load_corpus(DataSpec([str(folder)]), VIT, "images", classes)
    pico("vit").config.save_pretrained(tmp_path)
    assert reading_of(tmp_path).classes == {}


def test_pixels_are_numpy_s_and_batches_pure(folder):
    corpus = load_corpus(DataSpec([str(folder)]), VIT, "images")
    batches = batches_of(corpus, VIT, IMAGES, n=30)
    for i in (29, 3):
        assert same(batches[i], batches_of(corpus, VIT, IMAGES, n=30)[i])
    batch = batches[0]
    assert batch["pixel_values"].shape == (4, 3, 16, 16) and batch["labels"].dtype == torch.int64
    for row, got, label in zip(batch["row"], batch["pixel_values"], batch["labels"], strict=True):
        document = corpus.documents["train"][int(row)]
        image = Image.open(document.media.path)
        if image.size != (16, 16):
            image = image.resize((16, 16), Image.Resampling.BILINEAR)
        wanted = (np.asarray(image, np.float64) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(got, wanted.transpose(2, 0, 1), atol=1e-6)
        assert label == document.label


def test_doubled_images_count_once(folder):
    (folder / "ant" / "again.png").write_bytes((folder / "ant" / "1.png").read_bytes())
    corpus = load_corpus(DataSpec([str(folder)]), VIT, "images")
    assert sum(len(corpus.documents[s]) for s in ("train", "validation", "heldout")) == 48


def test_preprocessing_follows_transformers(tmp_path):
    from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    draw = np.random.default_rng(1)
    image = Image.fromarray(draw.integers(0, 256, (37, 50, 3), np.uint8))
    config = ViTConfig(image_size=24, patch_size=4)
    square = {"height": 24, "width": 24}
    processors = [
        ViTImageProcessorPil(size=square, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]),
        DeiTImageProcessorPil(
            size={"height": 28, "width": 28}, crop_size=square, do_center_crop=True
        ),
    ]
    for processor in processors:
        plan = image_plan(config, json.loads(processor.to_json_string()))
        wanted = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels(image, plan), wanted, atol=1e-5, rtol=1e-5)


def test_a_shorter_edge_and_a_crop():
    plan = image_plan(
        ViTConfig(image_size=8, patch_size=4),
        {"size": {"shortest_edge": 10}, "do_center_crop": True, "resample": 0},
    )
    image = Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20))
    got = pixels(image, plan)
    wanted = (np.arange(200).reshape(10, 20)[1:9, 6:14] / 255 - 0.5) / 0.5
    for channel in got:
        np.testing.assert_allclose(channel, wanted, atol=1e-6)


def test_a_shorter_edge_has_the_sizes_of_transformers():
    from transformers.image_transforms import get_resize_output_image_size

    for edge, wide, high in itertools.product((30, 32, 37), range(31, 90, 7), range(33, 90, 5)):
        image = Image.new("L", (wide, high))
        size = get_resize_output_image_size(
            np.zeros((high, wide, 3), np.uint8), edge, default_to_square=False
        )
        config = ViTConfig(image_size=size, patch_size=4)
        plan = image_plan(config, {"size": {"shortest_edge": edge}})
        assert pixels(image, plan).shape[1:] == size  # another size would be refused


def test_deit_has_a_token_more():
    assert image_plan(DeiTConfig(image_size=8, patch_size=4), {}).patches == 6


def test_mnist_is_read_as_numpy_reads_it(shared_data):
    file = shared_data / "data" / "t10k-images-idx3-ubyte.gz"
    raw = np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=16)
    images = raw.reshape(-1, 28, 28)
    labels = gzip.decompress((file.parent / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    corpus = load_corpus(DataSpec([str(file)]), VIT, "images")
    assert len(images) == 10000
    reading = Reading(
        "images", image=image_plan(ViTConfig(image_size=28, patch_size=7, num_channels=1), {})
    )
    batch = batches_of(corpus, VIT, reading, split="heldout", n=1)[0]
    for row, got in enumerate(batch["pixel_values"]):
        index = corpus.documents["heldout"][int(batch["row"][row])].media.index
        np.testing.assert_allclose(got[0], (images[index] / 255.0 - 0.5) / 0.5, atol=1e-6)
        assert batch["labels"][row] == labels[index]


def flat(folder, tmp_path, lines):
    (tmp_path / "flat").mkdir()
    for file in (folder / "ant").glob("*.png"):
        file.rename(tmp_path / "flat" / file.name)
    (tmp_path / "flat" / "labels.csv").write_text("file,label\n" + "\n".join(lines))
    return tmp_path / "flat"


def test_a_flat_folder_has_a_table_of_labels(folder, tmp_path):
    names = [f.name for f in (folder / "ant").glob("*.png")]
    place = flat(folder, tmp_path, [f"{name},{i % 5}" for i, name in enumerate(names)])
    corpus = load_corpus(DataSpec([str(place)]), VIT, "images")
    found = {d.media.path.name: d.label for docs in corpus.documents.values() for d in docs}
    assert found == {name: i % 5 for i, name in enumerate(names)}


def test_images_without_labels_have_none(folder, tmp_path):
    place = flat(folder, tmp_path, [])
    (place / "labels.csv").unlink()
    corpus = load_corpus(DataSpec([str(place)]), VIT, "images")
    assert "labels" not in batches_of(corpus, VIT, IMAGES, n=1)[0]


def break_folder(case, folder, tmp_path):
    """A folder with one mistake."""
    if case == "half":
        (folder / "loose.png").write_bytes((folder / "ant" / "1.png").read_bytes())
    elif case == "empty":
        (tmp_path / "empty").mkdir()
        return tmp_path / "empty"
    elif case == "suffix":
        for file in (folder / "ant").iterdir():
            file.rename(file.with_suffix(".bmp"))
    elif case == "text":
        (folder / "ant" / "bad.png").write_text("no image")
    elif case == "table":
        return flat(folder, tmp_path, ["1.png,0"])
    elif case == "missing":
        return tmp_path / "imagse"
    elif case == "file":
        (tmp_path / "a.txt").write_text("text")
        return tmp_path / "a.txt"
    return folder


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("half", "images in subfolders and images without a class"),
        ("empty", "holds no .png, .jpg, .jpeg image"),
        ("suffix", "and no .png, .jpg, .jpeg image"),
        ("text", "is no image that can be read"),
        ("table", "labels.csv has no class number for"),
        ("missing", "does not exist, did you mean images"),
        ("file", "is no folder of images"),
    ],
)
def test_bad_images_are_one_sentence(case, message, folder, tmp_path):
    place = break_folder(case, folder, tmp_path)
    with pytest.raises(CompressError) as caught:
        load_corpus(DataSpec([str(place)]), VIT, "images")
    assert (
        message in caught.value.what.replace("; ", ", ").replace(" (", ", ") and caught.value.hint
    )


def test_damaged_images_other_classes_and_channels(folder, tmp_path):
    for name in ("ant", "bee", "dog"):
        (tmp_path / "other" / name).mkdir(parents=True)
    (tmp_path / "other" / "dog" / "1.png").write_bytes((folder / "cat" / "1.png").read_bytes())
    with pytest.raises(CompressError, match="'other' has the classes ant, bee, dog and 'images'"):
        spec = DataSpec([str(folder)], heldout=[str(tmp_path / "other")])
        load_corpus(spec, VIT, "images")
    (tmp_path / "deep").mkdir()
    (tmp_path / "other").rename(tmp_path / "deep" / "images")
    with pytest.raises(CompressError, match=r"'images' has the classes .* dog and 'images' ant"):
        spec = DataSpec([str(folder)], heldout=[str(tmp_path / "deep" / "images")])
        load_corpus(spec, VIT, "images")
    for file in folder.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:200])
    corpus = load_corpus(DataSpec([str(folder)]), VIT, "images")
    with pytest.raises(CompressError, match="is damaged"):
        list(batches_of(corpus, VIT, IMAGES))
    with pytest.raises(CompressError, match="images of 4 channels"):
        image_plan(ViTConfig(num_channels=4), {})
    with pytest.raises(CompressError, match="normalizes 3 channels, the model reads 1"):
        image_plan(ViTConfig(num_channels=1), {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]})
    plan = image_plan(ViTConfig(image_size=8), {"size": {"height": 9, "width": 8}})
    with pytest.raises(CompressError, match="makes images of 8 x 9 and the model reads 8 x 8"):
        pixels(Image.new("L", (5, 5)), plan)


def pairs_file(tmp_path, suffix=".jsonl", names=("source", "target")):
    rows = [(f"what is {i} and {i}", f"it is {2 * i}") for i in range(40)]
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".csv":
        path.write_text(",".join(names) + "\n" + "\n".join(",".join(row) for row in rows))
    else:
        path.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("names", [("source", "target"), ("question", "answer")])
def test_pairs_become_source_and_shifted_answer(tmp_path, suffix, names):
    corpus = load_corpus(DataSpec([str(pairs_file(tmp_path, suffix, names))]), T5, "pairs")
    tokenizer = character_tokenizer()  # writes <s> in front and no </s> behind
    batch = batches_of(corpus, T5, PAIRS, tokenizer, n=5)[3]
    eos = tokenizer.eos_token_id
    for row in range(4):
        document = corpus.documents["train"][int(batch["row"][row])]
        source = tokenizer(document.text)["input_ids"]
        answer = [*tokenizer(document.target, add_special_tokens=False)["input_ids"], eos]
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == source
        real = batch["decoder_attention_mask"][row].bool()
        assert batch["labels"][row][real].tolist() == answer
        assert batch["decoder_input_ids"][row][real].tolist() == [0, *answer[:-1]]
        assert (batch["labels"][row][~real] == -100).all()
    assert same(batch, batches_of(corpus, T5, PAIRS, tokenizer, n=9)[3])
    held = {d.content for d in corpus.documents["heldout"]}
    assert held and not held & {d.content for d in corpus.documents["train"]}


@pytest.mark.parametrize("given", [False, True])
def test_all_answers_to_a_text_stay_in_one_split(tmp_path, given):
    def write(name, texts, answers):
        rows = [{"source": f"text {i}", "target": f"{j} of {i}"} for i in texts for j in answers]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return [str(tmp_path / name)]

    spec = DataSpec(write("a.jsonl", range(200), range(3)))
    if given:
        spec = DataSpec(spec.train, heldout=write("b.jsonl", range(40), [7]))
    found = load_corpus(spec, T5, "pairs").documents
    texts = [{d.text for d in found[s]} for s in ("train", "validation", "heldout")]
    assert all(texts) and sum(map(len, texts)) == 200 == len(set.union(*texts))
    assert len(found["heldout"]) == (40 if given else 48)
    assert len(found["train"]) == 3 * len(texts[0])


def test_a_text_with_most_of_the_answers_leaves_some_for_every_split(tmp_path):
    rows = [("often", f"answer {j}") for j in range(300)] + [(f"text {i}", "one") for i in range(3)]
    path = tmp_path / "a.csv"
    path.write_text("source,target\n" + "\n".join(map(",".join, rows)))
    found = load_corpus(DataSpec([str(path)]), T5, "pairs").documents
    texts = [{d.text for d in found[s]} for s in ("train", "validation", "heldout")]
    assert all(texts) and sum(map(len, texts)) == 4 == len(set.union(*texts))
    path.write_text("source,target\n" + "\n".join(map(",".join, rows[:301])))
    with pytest.raises(CompressError, match=r"2 distinct documents \(of 301, answers aside\)"):
        load_corpus(DataSpec([str(path)]), T5, "pairs")


def test_the_decoder_reads_what_transformers_would_feed_it():
    model = pico("t5")
    rows = Rows(np.arange(5, 12, dtype=np.int32), np.array([0, 4, 7]), np.arange(2))
    found = decoder_inputs(rows, np.arange(2), start=0)
    wanted = model.module._shift_right(found["labels"]) * found["decoder_attention_mask"]
    assert torch.equal(found["decoder_input_ids"], wanted)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"source": "x"}', 'a.jsonl:1: no "target" in this line'),
        ("a.csv", "source,label\nx,1", "a.csv: no column 'target'"),
        ("a.csv", "source,target\nx", "a.csv:2: no target in this row"),
        ("a.txt", "some text", "this model learns from pairs"),
    ],
)
def test_bad_pairs_are_one_sentence(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(CompressError) as caught:
        load_corpus(DataSpec([str(tmp_path / name)]), T5, "pairs")
    assert message in caught.value.what and caught.value.hint


@pytest.fixture
def clips(tmp_path):
    """Twelve clips of 0.3 s at three rates, and their table."""
    soundfile = pytest.importorskip("soundfile", reason="reading sound needs soundfile")
    lines, draw = ["audio,text"], np.random.default_rng(0)
    for i in range(12):
        rate = (16000, 8000, 44100)[i % 3]
        name = f"{i}.{'wav' if i % 2 else 'flac'}"
        soundfile.write(tmp_path / name, draw.uniform(-0.5, 0.5, int(0.3 * rate)), rate)
        lines.append(f"{name},word number {i}")
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    return tmp_path / "clips.csv"


def test_clips_become_features_and_words(clips):
    soundfile = pytest.importorskip("soundfile", reason="reading sound needs soundfile")
    model, tokenizer = pico("whisper"), character_tokenizer()
    reading = Reading("audio", start=2, audio=audio_plan(model.config, {}))
    corpus = load_corpus(DataSpec([str(clips)]), WHISPER, "audio")
    batch = batches_of(corpus, WHISPER, reading, tokenizer, n=3)[1]
    assert batch["input_features"].shape == (4, 16, 40)
    extractor = WhisperFeatureExtractor(feature_size=16)
    for row in range(4):
        document = corpus.documents["train"][int(batch["row"][row])]
        answer = tokenizer(document.target, add_special_tokens=False)["input_ids"]
        real = batch["labels"][row] != -100
        assert batch["labels"][row][real].tolist() == [*answer, tokenizer.eos_token_id]
        assert batch["decoder_input_ids"][row, 0] == 2
        samples, rate = soundfile.read(document.media.path)
        if rate == 16000:
            padded = np.zeros(6400, np.float32)
            padded[: len(samples)] = samples
            wanted = extractor(padded, sampling_rate=16000, max_length=6400)["input_features"][0]
            np.testing.assert_allclose(batch["input_features"][row], wanted, atol=1e-5)
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k not in ("row", "document")}
        assert torch.isfinite(model.module(**inputs).loss)


def test_all_words_of_a_clip_stay_in_one_split(clips):
    names = [f"{i}.{'wav' if i % 2 else 'flac'}" for i in range(12)]
    rows = [f"{name},words {i}" for name in names for i in range(5)]
    clips.write_text("audio,text\n" + "\n".join(rows))
    found = load_corpus(DataSpec([str(clips)]), WHISPER, "audio").documents
    heard = [{d.media.sha256 for d in found[s]} for s in ("train", "validation", "heldout")]
    assert all(heard) and sum(map(len, heard)) == 12 == len(set.union(*heard))


def test_real_speech_gives_the_features_of_transformers(shared_data):
    soundfile = pytest.importorskip("soundfile", reason="reading sound needs soundfile")
    samples, rate = soundfile.read(shared_data / "data" / "jfk.flac")
    speech = resample(samples.mean(axis=1), rate, 16000).astype(np.float32)
    assert len(speech) == 176000
    plan = audio_plan(WhisperConfig(), {})
    wanted = WhisperFeatureExtractor()(speech, sampling_rate=16000, return_tensors="pt")
    assert torch.equal(features([speech], plan), wanted["input_features"])


@pytest.mark.parametrize(("before", "after"), [(44100, 16000), (8000, 16000), (16000, 8000)])
def test_resampling_keeps_a_tone_and_folds_nothing_back(before, after):
    time = np.arange(before) / before
    tone = np.sin(2 * np.pi * 440 * time)
    got = resample(tone + np.sin(2 * np.pi * 3999.0 * time), before, after)
    seconds = np.arange(after) / after
    wanted = np.sin(2 * np.pi * 440 * seconds) + np.sin(2 * np.pi * 3999.0 * seconds)
    np.testing.assert_allclose(got, wanted, atol=1e-9)
    if before == 44100:
        above = resample(np.sin(2 * np.pi * 12000 * time), before, after)
        assert np.abs(above).max() < 1e-9


def test_bad_clips_are_one_sentence(clips, tmp_path, monkeypatch):
    model, tokenizer = pico("whisper"), character_tokenizer()
    corpus = load_corpus(DataSpec([str(clips)]), WHISPER, "audio")
    short = AudioPlan(WhisperFeatureExtractor(feature_size=16), 20)
    with pytest.raises(CompressError, match=r"is 0.3 s long and the model hears 0.2 s"):
        batches_of(corpus, WHISPER, Reading("audio", 2, audio=short), tokenizer)
    plan = Reading("audio", 2, audio=audio_plan(model.config, {}))
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "soundfile", None)
        with pytest.raises(CompressError, match="needs the package soundfile"):
            batches_of(corpus, WHISPER, plan, tokenizer)
    (tmp_path / "0.flac").write_text("no sound")
    with pytest.raises(CompressError, match="is no sound that can be read"):
        batches_of(load_corpus(DataSpec([str(clips)]), WHISPER, "audio"), WHISPER, plan, tokenizer)
    (tmp_path / "3.wav").unlink()
    with pytest.raises(CompressError, match=r"clips.csv:5: there is no audio file '3.wav'"):
        load_corpus(DataSpec([str(clips)]), WHISPER, "audio")
    with pytest.raises(CompressError, match="makes 80 mel bands and the model reads 16"):
        audio_plan(model.config, WhisperFeatureExtractor(feature_size=80).to_dict())


def test_bad_clips_of_any_split_are_found_when_rows_are_first_read(clips, tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="reading sound needs soundfile")
    tokenizer = character_tokenizer()
    reading = Reading("audio", 2, audio=audio_plan(pico("whisper").config, {}))
    held, clip = tmp_path / "held.csv", tmp_path / "held.wav"
    held.write_text("audio,text\nheld.wav,words")
    for seconds, message in ((0, "holds no sound"), (5, "is 5.0 s long and the model hears")):
        soundfile.write(clip, np.zeros(16000 * seconds), 16000)
        corpus = load_corpus(DataSpec([str(clips)], heldout=[str(held)]), WHISPER, "audio")
        with pytest.raises(CompressError, match=message):
            batches_of(corpus, WHISPER, reading, tokenizer, split="train")
    soundfile.write(clip, np.zeros(1600), 16000)
    corpus = load_corpus(DataSpec([str(clips)], heldout=[str(held)]), WHISPER, "audio")
    found = batches_of(corpus, WHISPER, reading, tokenizer, split="heldout")
    clip.write_text("no sound")
    with pytest.raises(CompressError, match="is no sound that can be read"):
        list(found)


def test_a_processor_saved_by_transformers_is_read_and_carried(tmp_path):
    pico("whisper").config.save_pretrained(tmp_path)
    extractor = WhisperFeatureExtractor(feature_size=16, n_fft=200, hop_length=80)
    WhisperProcessor(extractor, character_tokenizer()).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    plan = reading_of(tmp_path).audio
    clip = np.random.default_rng(0).uniform(-0.5, 0.5, 2000).astype(np.float32)
    wanted = extractor(clip, sampling_rate=16000, max_length=3200, return_tensors="pt")
    assert plan.samples == 3200
    assert torch.equal(features([clip], plan), wanted["input_features"])
    assert "processor_config.json" in {file.name for file in side_files(tmp_path)}


@pytest.mark.parametrize("name", ["vit", "whisper"])
@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, "wrong values"])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_damaged_preprocessing_is_one_sentence(name, content, file, tmp_path):
    pico(name).config.save_pretrained(tmp_path)
    values = [{"size": {"longest_edge": 32}}, {"image_mean": 0.5}, {"size": "16"}, {"resample": 9}]
    if name == "whisper":
        values = [{"feature_size": "16"}, {"hop_length": 0}]
    if file == "processor_config.json":
        entry = "image_processor" if name == "vit" else "feature_extractor"
        values = [{entry: value} for value in values]
    texts = list(map(json.dumps, values)) if content == "wrong values" else [content]
    for text in texts:
        (tmp_path / file).write_text(text)
        with pytest.raises(CompressError, match=r"processor_config\.json") as caught:
            reading_of(tmp_path)
        assert caught.value.hint


def test_a_damaged_idx_file_is_one_sentence(tmp_path):
    draw = np.random.default_rng(0)
    raw = np.array([0x803, 50, 4, 4], ">u4").tobytes() + draw.bytes(800)
    file = tmp_path / "t-images-idx3-ubyte.gz"
    packed = bytearray(gzip.compress(raw))
    packed[10:40] = b"\xff" * 30
    file.write_bytes(packed)
    (tmp_path / "t-labels-idx1-ubyte.gz").write_bytes(b"")
    with pytest.raises(CompressError, match="is damaged"):
        load_corpus(DataSpec([str(file)]), VIT, "images")


def test_an_image_processor_may_lie_in_processor_config(tmp_path):
    pico("vit").config.save_pretrained(tmp_path)
    entry = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": entry}))
    assert reading_of(tmp_path).image.mean == (0.1, 0.2, 0.3)


@pytest.fixture
def masked_corpus(tmp_path):
    text = "\n\n".join(f"the quick brown fox number {i * 7919} jumps over it" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    return load_corpus(DataSpec([str(tmp_path / "a.txt")]), BERT)


def test_hidden_tokens_are_bert_s_and_a_function_of_seed_and_i(masked_corpus):
    tokenizer = letter_tokenizer()
    shape = {"processor": tokenizer, "n": 50, "batch": 16, "length": 64}
    batches = batches_of(masked_corpus, BERT, **shape)
    straight = list(batches)
    for i in (49, 0, -1):
        assert same(straight[i], batches_of(masked_corpus, BERT, **shape)[i])
    assert not same(straight[0], batches_of(masked_corpus, BERT, seed=1, **shape)[0])
    hidden = masked = kept = free = 0
    for batch in straight:
        chosen = batch["labels"] != -100
        assert chosen.any(dim=1).all()
        original = torch.where(chosen, batch["labels"], batch["input_ids"])
        special = torch.isin(original, torch.tensor(tokenizer.all_special_ids))
        assert not (chosen & (special | (batch["attention_mask"] == 0))).any()
        hidden += int(chosen.sum())
        free += int((~special).sum())
        masked += int((batch["input_ids"] == tokenizer.mask_token_id).sum())
        kept += int((chosen & (batch["input_ids"] == batch["labels"])).sum())
    assert hidden / free == pytest.approx(SHARE, abs=0.01)
    assert masked / hidden == pytest.approx(0.8, abs=0.03)
    assert kept / hidden == pytest.approx(0.1, abs=0.03)


def test_masking_needs_a_mask_token_and_text(masked_corpus):
    with pytest.raises(CompressError, match="needs a mask token"):
        batches_of(masked_corpus, BERT, processor=character_tokenizer())
    with pytest.raises(CompressError, match="no token that could be hidden"):
        batches_of(masked_corpus, BERT, processor=letter_tokenizer(), length=2)[0]


@pytest.mark.parametrize(
    ("name", "kind", "positions", "most"),
    [
        ("llama", "text", 10, 128),
        ("gpt2", "text", 10, 64),
        ("bert", "text", 10, 128),
        ("roberta", "text", 10, 127),
        ("t5", "pairs", 20, None),
        ("whisper", "audio", 30, 32),
        ("vit", "images", 17, None),
    ],
)
def test_a_checkpoint_says_what_it_reads(name, kind, positions, most, tmp_path):
    config = pico(name).config
    config.save_pretrained(tmp_path)
    reading = reading_of(tmp_path)
    assert reading.kind == kind and reading.positions(10) == positions
    assert most_tokens(config) == most
