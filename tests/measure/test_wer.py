"""Word error rate: distances by recursion and by jiwer, transcripts by transformers' generate."""

import dataclasses
from functools import cache

import pytest
import torch
from tokenizers import processors

import compressor
from compressor.engines import open_engine
from compressor.errors import CompressError
from compressor.measure import wer
from conftest import character_tokenizer
from families import pico, random_inputs

FIRST = 9  # a token that the tokenizer below puts before every text


def by_recursion(a, b):
    @cache
    def distance(i, j):
        if not i or not j:
            return i + j
        same = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(same, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(a), len(b))


def sentences(count):
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        sizes = torch.randint(0, 9, (2,), generator=draw).tolist()
        yield tuple(
            [f"w{i}" for i in torch.randint(4, (size,), generator=draw).tolist()] for size in sizes
        )


def test_the_distance_is_the_fewest_edits():
    for a, b in sentences(200):
        assert wer.distance(a, b) == by_recursion(tuple(a), tuple(b))


def test_the_rate_is_that_of_jiwer():
    jiwer = pytest.importorskip("jiwer", reason="the reference is jiwer")
    pairs = [(a, b) for a, b in sentences(100) if a]
    wanted = jiwer.wer([" ".join(a) for a, _ in pairs], [" ".join(b) for _, b in pairs])
    errors = sum(wer.distance(a, b) for a, b in pairs)
    assert errors / sum(len(a) for a, _ in pairs) == pytest.approx(wanted, abs=1e-12)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A pico Whisper, whose tokenizer and generation_config.json have wishes, and its export."""
    model = pico("whisper", seed=4, tie_word_embeddings=False, init_std=0.5)  # a lively one
    folder = tmp_path_factory.mktemp("speech") / "a"
    tokenizer = character_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> f $A </s>", special_tokens=[("<s>", 2), ("f", FIRST), ("</s>", 3)]
    )
    model.module.generation_config.suppress_tokens = [20, 21, 22]
    model.module.generation_config.begin_suppress_tokens = [3, 30]
    model.module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    artifact = compressor.export_checkpoint(str(folder), to="onnx", out=folder.parent / "onnx")
    return model, tokenizer, {"torch": folder, "onnxruntime": artifact.path}


def clips():
    found = random_inputs(pico("whisper"), rows=4)
    return {"input_features": 3 * found["input_features"]}


def expected(model, features, rules):
    """Greedy tokens of one clip: the whole text anew at each step, no cache."""
    ids = [2, FIRST]
    while len(ids) < 32:
        with torch.no_grad():
            logits = model.module(
                input_features=features[None], decoder_input_ids=torch.tensor([ids])
            ).logits[0, -1]
        banned = rules if len(ids) > 2 else [*rules, 3, 30]
        logits[banned] = -torch.inf
        if (token := int(logits.argmax())) == 3:
            break
        ids.append(token)
    return ids[2:]


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_what_is_written_is_greedy(name, speech):
    model, tokenizer, folders = speech
    batch = clips()
    engine = open_engine(folders[name])
    assert engine.name == name
    found = wer.transcribe(engine, tokenizer, batch, 32)
    wanted = [expected(model, row, [20, 21, 22]) for row in batch["input_features"]]
    assert found == wanted
    assert min(map(len, found)) < 30 == max(map(len, found))  # some end, some do not


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_the_rate_of_clips(name, speech, make_work):
    """Two clips said as written, one with a word too many; one said in capitals with a comma."""
    model, tokenizer, folders = speech
    batch = clips()
    written = [
        tokenizer.decode(expected(model, row, [20, 21, 22])) for row in batch["input_features"]
    ]
    plain = wer._words("basic")
    said = [written[0], written[1], written[2] + " more", "word, word Other"]
    tokens = [[FIRST, *tokenizer(text, add_special_tokens=False)["input_ids"], 3] for text in said]
    longest = max(map(len, tokens))
    batch["labels"] = torch.tensor([row + [-100] * (longest - len(row)) for row in tokens])
    batch["document"] = torch.arange(4)
    work = dataclasses.replace(make_work(), _batches=lambda split, n, **shape: [batch])
    found = wer.run(open_engine(folders[name]), wer.Options(), work)
    heard = ["f" + text for text in said]  # the token in front is a letter here
    pairs = [(plain(a), plain(b)) for a, b in zip(heard, written, strict=True)]
    errors = [by_recursion(tuple(a), tuple(b)) for a, b in pairs]
    assert found["wer"] == pytest.approx(sum(errors) / sum(len(a) for a, _ in pairs))
    assert found["wer_low"] <= found["wer"] <= found["wer_high"] and found["wer_n"] == 4


def test_normalizing():
    assert wer._words("basic")("Well, [noise] IT is (sighs) 5 o'clock!") == [
        *["well", "it", "is", "5", "o", "clock"]
    ]
    assert wer._words("none")(" Well,  it ") == ["Well,", "it"]


def test_other_models_have_none(pico_llama, make_work, tmp_path):
    model = pico_llama()
    model.module.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    with pytest.raises(CompressError, match="does not write down speech") as caught:
        wer.run(open_engine(tmp_path), wer.Options(), make_work())
    assert "leave out wer" in caught.value.hint
