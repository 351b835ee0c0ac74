"""Text: what becomes a document, a split, a row and a batch, and every way it can be wrong."""

import json

import pytest
import torch

from compressor.errors import CompressError
from compressor.training.data import DataSpec, load_corpus, make_batches
from compressor.training.sources import read_source
from compressor.training.stdlib import stdlib_texts

ENCODER, DECODER = "feature-extraction", "causal-lm"


def sentence(i):
    return f"this is sentence number {i} of a text about stones, rivers and birds {i * 7919}"


@pytest.fixture
def text(tmp_path):
    """Factory: write documents to a .txt, one per blank line."""

    def write(documents, name="a.txt"):
        (tmp_path / name).write_text("\n\n".join(documents), encoding="utf-8")
        return str(tmp_path / name)

    return write


def contents(corpus, split):
    return {document.content for document in corpus.documents[split]}


def test_splits_share_no_document_and_do_not_depend_on_order(text):
    documents = [sentence(i) for i in range(200)]
    forward = load_corpus(DataSpec([text(documents)]), DECODER)
    backward = load_corpus(DataSpec([text(documents[::-1] + documents[:50], "b.txt")]), DECODER)
    assert forward.sha256 == backward.sha256
    train, held, valid = (contents(forward, s) for s in ("train", "heldout", "validation"))
    assert (len(train), len(held), len(valid)) == (176, 16, 8)
    assert not train & held and not train & valid and not held & valid
    assert contents(forward, "calibration") == train


def test_other_text_has_another_hash(text):
    documents = [sentence(i) for i in range(40)]
    first = load_corpus(DataSpec([text(documents)]), DECODER)
    second = load_corpus(DataSpec([text([*documents[1:], "new words"], "b.txt")]), DECODER)
    assert first.sha256 != second.sha256


def test_given_splits_are_taken_out_of_train(text):
    documents = [sentence(i) for i in range(60)]
    spec = DataSpec([text(documents)], heldout=[text(documents[:9], "h.txt")])
    corpus = load_corpus(spec, DECODER)
    assert len(contents(corpus, "heldout")) == 9
    assert len(contents(corpus, "train")) + len(contents(corpus, "validation")) == 51
    assert not contents(corpus, "train") & contents(corpus, "heldout")


@pytest.mark.parametrize("given", [{}, {"heldout"}, {"validation"}, {"heldout", "validation"}])
@pytest.mark.parametrize("task", [ENCODER, DECODER])
def test_calibration_holds_nothing_that_is_held_out(text, task, given):
    path = text([sentence(i) for i in range(60)])
    other = {name: [text([sentence(i) for i in range(9)], f"{name}.txt")] for name in given}
    if len(given) == 2:
        other["validation"] = [text([sentence(i) for i in range(9, 15)], "v.txt")]
    corpus = load_corpus(DataSpec([path], calibration=[path], **other), task)
    held = contents(corpus, "heldout") | contents(corpus, "validation")
    assert contents(corpus, "calibration") == contents(corpus, "train")
    assert held and not contents(corpus, "calibration") & held
    with pytest.raises(CompressError, match="nothing is left for the split 'calibration'"):
        only = text(
            [next(iter(contents(corpus, "heldout"))), *contents(corpus, "validation")], "o.txt"
        )
        load_corpus(DataSpec([path], calibration=[only], **other), task)


def test_one_single_document_is_divided_by_position(text):
    words = [f"word{i}" for i in range(6000)]
    corpus = load_corpus(DataSpec([text([" ".join(words)])]), DECODER)
    found = {
        s: " ".join(d.text for d in corpus.documents[s]).split()
        for s in ("train", "validation", "heldout")
    }
    assert found["train"] + found["validation"] + found["heldout"] == words
    assert len(found["heldout"]) > len(found["validation"]) > 100


def test_a_line_of_endoftext_is_a_border_and_nothing_else_is(tmp_path):
    stories = [f"Story {i} was told.\nIt has two lines.\n\nAnd an end." for i in range(9)]
    stories[4] += " <|endoftext|> stands inside a line.\n <|endoftext|>"

    def documents(name, text):
        (tmp_path / name).write_bytes(text.encode())
        return [d.text for d in read_source(str(tmp_path / name))]

    wanted = [story.strip() for story in stories]
    marker = "<|endoftext|>"
    for number, text in enumerate(
        [
            f"\n{marker}\n".join(stories),
            f"{marker}\n" + f"\n{marker}\n{marker}\n".join(stories) + f"\n{marker}",
            f"\r\n\r\n{marker}\r\n".join(s.replace("\n", "\r\n") for s in stories),
        ]
    ):
        assert documents(f"{number}.txt", text) == wanted
    without = documents("blank.txt", "\n\n".join(stories[:2]))
    assert without == [part for story in stories[:2] for part in story.split("\n\n")]


def test_paragraphs_of_encoders_appear_once_in_all_splits(tmp_path):
    shared = "a paragraph that many documents repeat"
    lines = [{"text": f"{shared}\n\n{sentence(i)}\n\nshort"} for i in range(50)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    corpus = load_corpus(DataSpec([str(path)]), ENCODER)
    splits = ("train", "validation", "heldout")
    rows = [row for s in splits for d in corpus.documents[s] for row in d.rows]
    assert len(rows) == len(set(rows)) == 51
    assert "short" not in rows
    assert any(shared in d.rows for d in corpus.documents["heldout"])


@pytest.fixture
def corpora(text):
    documents = [sentence(i) + " and more" * (i % 5) for i in range(120)]
    path = text(documents)
    return {task: load_corpus(DataSpec([path]), task) for task in (ENCODER, DECODER)}


@pytest.mark.parametrize("task", [ENCODER, DECODER])
def test_batch_i_is_a_pure_function_of_seed_and_i(corpora, task, pico_bert, pico_llama):
    processor = (pico_bert if task == ENCODER else pico_llama)().processor
    shape = {"task": task, "batch": 8, "length": 32}

    def batches(seed):
        return make_batches(corpora[task], processor, "train", 60, seed=seed, **shape)

    straight, jumping, other = list(batches(3)), batches(3), batches(4)
    for i in (59, 0, 31, 7):
        for key, value in jumping[i].items():
            assert torch.equal(value, straight[i][key])
    assert not torch.equal(other[0]["row"], straight[0]["row"])
    rows = {}
    for batch in straight:  # several epochs: a row number always means the same text
        for row, ids, mask in zip(
            batch["row"].tolist(), batch["input_ids"], batch["attention_mask"], strict=True
        ):
            assert rows.setdefault(row, ids[mask.bool()].tolist()) == ids[mask.bool()].tolist()
    assert len({*straight[0]["row"].tolist()}) == 8


def test_an_epoch_shows_every_row_once(corpora, pico_bert):
    processor = pico_bert().processor
    epoch = make_batches(
        corpora[ENCODER], processor, "train", None, task=ENCODER, seed=0, batch=8, length=32
    )
    rows = torch.cat([batch["row"] for batch in epoch]).tolist()
    assert len(rows) == len(set(rows)) > 96


def test_other_splits_run_in_order_once(corpora, pico_bert):
    processor = pico_bert().processor
    shape = {"task": ENCODER, "seed": 0, "batch": 4, "length": 32}
    every = make_batches(corpora[ENCODER], processor, "heldout", None, **shape)
    rows = torch.cat([batch["row"] for batch in every])
    assert rows.tolist() == list(range(10))
    documents = torch.cat([batch["document"] for batch in every])
    assert documents.tolist() == sorted(documents.tolist())
    assert len(make_batches(corpora[ENCODER], processor, "heldout", 2, **shape)) == 2


def test_encoder_rows_are_what_the_tokenizer_says(corpora, pico_bert):
    processor = pico_bert().processor
    batch = make_batches(
        corpora[ENCODER], processor, "validation", 1, task=ENCODER, seed=0, batch=3, length=20
    )[0]
    texts = [d.rows[0] for d in corpora[ENCODER].documents["validation"][:3]]
    wanted = processor(texts, truncation=True, max_length=20, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], wanted["input_ids"])
    assert torch.equal(batch["attention_mask"], wanted["attention_mask"])


def test_decoder_rows_are_full_windows_of_separated_documents(corpora, pico_llama):
    processor = pico_llama().processor
    processor.pad_token = None
    batches = make_batches(
        corpora[DECODER], processor, "heldout", None, task=DECODER, seed=0, batch=4, length=50
    )
    stream = []
    for document in corpora[DECODER].documents["heldout"]:
        ids = processor(document.text, add_special_tokens=False)["input_ids"]
        stream += [processor.bos_token_id, *ids, processor.eos_token_id]
    got = torch.cat([batch["input_ids"] for batch in batches]).flatten().tolist()
    assert got == stream[: len(stream) // 50 * 50]
    assert all(bool(batch["attention_mask"].all()) for batch in batches)


def test_labelled_documents_are_whole_rows(tmp_path, pico_bert):
    path = tmp_path / "a.csv"
    lines = [f'"{sentence(i)}\n\nand its second paragraph {i}",{i % 2}' for i in range(40)]
    path.write_text("text,label\n" + "\n".join(lines), encoding="utf-8")
    task = "text-classification"
    corpus = load_corpus(DataSpec([str(path)]), task)
    batch = make_batches(
        corpus, pico_bert().processor, "train", 1, task=task, seed=0, batch=8, length=64
    )[0]
    wanted = [corpus.documents["train"][i].label for i in batch["document"].tolist()]
    assert batch["labels"].tolist() == wanted


def test_padding_is_little(pico_bert, text):
    documents = [sentence(i) + " word" * (i * 37 % 29) for i in range(600)]
    corpus = load_corpus(DataSpec([text(documents)]), ENCODER)
    batches = make_batches(
        corpus, pico_bert().processor, "train", 40, task=ENCODER, seed=0, batch=16, length=512
    )
    masks = torch.cat([batch["attention_mask"].flatten() for batch in batches])
    assert masks.float().mean() > 0.85


BAD = {
    "missing": ("bb.txt", None, "does not exist; did you mean b.txt"),
    "suffix": ("a.pdf", b"x", "no text that is known"),
    "not utf-8": ("a.txt", b"good \xff bad", "byte 0xff at offset 5"),
    "empty": ("a.txt", b"  \n \n", "holds no text"),
    "two documents": ("a.txt", b"one\n\ntwo", "2 distinct documents are too few"),
    "duplicates": ("a.txt", b"one\n\none\n \none\n\none", "1 distinct documents are too few"),
    "no json": ("a.jsonl", b'{"text": "a"}\n{"text', "a.jsonl:2: not JSON"),
    "deep json": ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "a.jsonl:2: not JSON"),
    "no text": ("a.jsonl", b'{"text": "a"}\n\n{"texts": "b"}', 'a.jsonl:3: no "text"'),
    "label": ("a.jsonl", b'{"text": "a", "label": "good"}', "label 'good' is no class number"),
    "half a character": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b \\ud83d c"}',
        r"a.jsonl:2: '\ud83d' is half of a character",
    ),
    "no column": ("a.csv", b"sentence,label\nx,0\n", "no column 'text'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_sentence(case, tmp_path):
    name, content, message = BAD[case]
    (tmp_path / "b.txt").write_text("something else")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CompressError) as caught:
        load_corpus(DataSpec([str(tmp_path / name)]), DECODER)
    assert message in caught.value.what and caught.value.hint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("stdlib:jsn", "did you mean json"),
        ("stdlib:../../x", "is no module name"),
        ("stdlib:this", "has no docstrings"),
    ],
)
def test_bad_modules_are_one_sentence(source, message):
    with pytest.raises(CompressError, match=message):
        load_corpus(DataSpec([source]), DECODER)


def test_too_short_for_a_batch(text, pico_llama):
    corpus = load_corpus(DataSpec([text([f"document {i}" for i in range(10)])]), DECODER)
    with pytest.raises(CompressError, match="one batch needs 8") as caught:
        make_batches(
            corpus, pico_llama().processor, "train", 1, task=DECODER, seed=0, batch=8, length=64
        )
    assert "lower batch or length" in caught.value.hint


def test_no_train_text_and_nothing_left(text):
    path = text([sentence(i) for i in range(30)])
    with pytest.raises(CompressError, match="no text to train on"):
        load_corpus(DataSpec(heldout=[path]), DECODER)
    with pytest.raises(CompressError, match="nothing is left for the split 'train'"):
        load_corpus(DataSpec([path], heldout=[path]), DECODER)
    with pytest.raises(CompressError, match="no paragraph of 20 characters"):
        load_corpus(DataSpec([text([f"tiny {i}" for i in range(30)], "t.txt")]), ENCODER)


def test_half_labelled_data_is_refused(tmp_path):
    lines = [{"text": sentence(i)} | ({"label": 1} if i else {}) for i in range(30)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(CompressError, match="some documents have a label"):
        load_corpus(DataSpec([str(path)]), "text-classification")


@pytest.mark.parametrize("task", [ENCODER, DECODER])
def test_labels_are_ignored_by_who_does_not_classify(tmp_path, task, pico_bert, pico_llama):
    lines = [{"text": sentence(i)} | ({"label": 1} if i % 9 != 4 else {}) for i in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    corpus = load_corpus(DataSpec([str(path)]), task)
    processor = (pico_bert if task == ENCODER else pico_llama)().processor
    batch = make_batches(corpus, processor, "train", 1, task=task, seed=0, length=32)[0]
    assert "labels" not in batch


def test_a_cell_may_be_a_long_document(tmp_path):
    path, long = tmp_path / "a.csv", "word " * 40_000
    rows = [f'"{long}{i}\r second line"' for i in range(20)]
    path.write_text("\n".join(["text", *rows, "bare \r return"]), encoding="utf-8")
    documents = load_corpus(DataSpec([str(path)]), DECODER).documents["train"]
    assert max(len(document.text) for document in documents) > 200_000


def test_the_standard_library_speaks_english():
    topics = stdlib_texts("pydoc_data.topics")
    assert len(topics) > 60 and all(isinstance(topic, str) for topic in topics)
    (one,) = stdlib_texts("json.decoder")
    import json.decoder

    assert json.decoder.__doc__.strip() in one
    assert len(stdlib_texts("email")) > 10


def test_no_warning_for_texts_longer_than_the_model(corpora, pico_llama, recwarn, caplog):
    make_batches(
        corpora[DECODER], pico_llama().processor, "train", 1, task=DECODER, seed=0, length=64
    )
    assert not caplog.records and not recwarn.list
