"""A teacher's largest logits on disk: the truncated KL, what it costs, and what is refused."""

import pytest
import torch

from compressor.distill import kd, minitron, runner
from compressor.distill.logits import id_type, kept_bytes
from compressor.errors import CompressError
from compressor.training import teacher as stored_outputs
from compressor.training.losses import divergence, truncated_kl
from compressor.training.options import Train
from compressor.training.teacher import given_outputs, with_outputs
from families import VOCABULARY, pico
from predicting import labelled, scored

SHORT = {"steps": 6, "batch": 4, "length": 16, "lr": 2e-3, "warmup": 1, "precision": "float32"}


def numbered(work, every=3):
    """A workbench whose train rows have numbers and come back after `every` batches."""
    plain = work._batches

    def batches(split, n, **shape):
        few = plain(split, every, **shape)
        size = len(few[0]["input_ids"])
        found = [b | {"row": torch.arange(i * size, (i + 1) * size)} for i, b in enumerate(few)]
        return [found[i % every] for i in range(every if n is None else n)]

    object.__setattr__(work, "_batches", batches)
    return work


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_truncated_kl_is_the_formula(temperature):
    draw = torch.Generator().manual_seed(0)
    s, t = (torch.randn(5, 20, generator=draw) * 3 for _ in range(2))
    log_p, index = t.log_softmax(-1).topk(4, dim=-1)
    got = truncated_kl(s, index, log_p, temperature)
    for row in range(5):
        kept = sorted(range(20), key=lambda v: -t[row, v].item())[:4]
        weights = [torch.exp(t[row, v].double() / temperature) for v in kept]
        p = torch.stack(weights) / sum(weights)
        q = (s[row].double() / temperature).softmax(-1)[kept]
        wanted = temperature**2 * (p * (p / q).log()).sum()
        assert got[row].item() == pytest.approx(wanted.item(), rel=1e-5)
    whole = t.log_softmax(-1).topk(20, dim=-1)
    everything = truncated_kl(s, whole.indices, whole.values, temperature)
    torch.testing.assert_close(everything, divergence("forward", temperature)(s, t))


@pytest.mark.parametrize("k", [1, 7, VOCABULARY])
def test_the_loss_of_a_batch_is_over_the_k_largest(k):
    student, teacher = pico("llama"), pico("llama", seed=1)
    batch = labelled(student)
    z_s, z_t = scored(student, batch)[0], scored(teacher, batch)[0]
    log_p, index = z_t.log_softmax(-1).topk(k, dim=-1)
    p, q = log_p.softmax(-1), z_s.log_softmax(-1).gather(-1, index)
    wanted = (p * (p.log() - q)).sum(-1).mean()
    objective = kd.objective(kd.Options(top_k=k), student, teacher)
    assert objective(batch).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_the_whole_vocabulary_on_disk_is_the_live_teacher(make_work):
    teacher = pico("llama", seed=1)
    student = pico("llama", num_hidden_layers=2)
    work = numbered(make_work(teacher))
    live = minitron.objective(minitron.Options(), student, teacher)
    stored = minitron.objective(minitron.Options(top_k=VOCABULARY), student, teacher)
    batches = with_outputs(work.batches("train", 3), stored, teacher.module, work)
    for batch in batches:
        assert set(given_outputs(batch)) == {"index", "log_p", "0.0", "0.1"}
        assert stored(batch).item() == pytest.approx(live(batch).item(), rel=2e-3)
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    record = kept_bytes(VOCABULARY, VOCABULARY) + 2 * 2 * 32  # two states of 32 in float16
    assert (work.scratch / "teacher-outputs.bin").stat().st_size == tokens * record


def test_ids_take_what_the_vocabulary_needs():
    assert id_type(2**16) == torch.uint16 and id_type(2**16 + 1) == torch.int32
    assert kept_bytes(10, 50_000) == 10 * (2 + 2) and kept_bytes(10, 128_000) == 10 * (4 + 2)
    assert kept_bytes(99, 20) == 20 * 4 and kept_bytes(None, 20) == 0


@pytest.mark.parametrize("method", [kd, minitron])
def test_training_asks_the_teacher_once(method, make_work):
    teacher = pico("llama", seed=1)
    calls, log = [], []
    teacher.base.register_forward_hook(lambda module, inputs, output: calls.append(1))
    student = pico("llama")
    options = method.Options(train=Train(**SHORT), top_k=8)
    work = numbered(make_work(teacher, log=log))
    runner.run(student, method.objective(options, student, teacher), options, work)
    asked = 1 + 3  # once for the layout, then every row
    assert len(calls) == asked + 2 * 3  # and the validation rows, before and after
    assert any("MB of disk" in line for line in log)
    found = student.notes["validation"]
    assert found["after"] < found["before"]


@pytest.mark.parametrize("k", [100, 101, 8, VOCABULARY, 1000])
def test_remarks_before_work(k):
    student = pico("llama", vocab_size=200) if k in (100, 101) else pico("llama")
    remarks = kd.objective(kd.Options(top_k=k), student, student).remarks
    if k in (8, 100):
        assert f"top_k is {k}: Minitron" in remarks[0] and "100 tokens or fewer" in remarks[0]
    elif k == 101:
        assert remarks == ()
    else:
        assert "the teacher's whole distribution is kept" in remarks[0]


@pytest.mark.parametrize("method", [kd, minitron])
def test_what_top_k_cannot_do_is_refused(method):
    llama = pico("llama")
    with pytest.raises(CompressError, match="this is a seq2seq-lm model"):
        method.objective(method.Options(top_k=8), pico("t5"), pico("t5"))
    with pytest.raises(CompressError, match="which kind: reverse cannot use"):
        method.objective(method.Options(top_k=8, kind="reverse"), llama, llama)
    both = method.Options(top_k=8, correct_teacher={"lr": 1e-4})
    with pytest.raises(CompressError, match="correct_teacher changes it at every step"):
        method.objective(both, llama, llama)


def test_asking_that_was_interrupted_leaves_the_same_file(make_work, monkeypatch):
    teacher = pico("llama", seed=1)
    monkeypatch.setattr(stored_outputs, "_FLUSH_SECONDS", 0)
    work = numbered(make_work(teacher))
    objective = minitron.objective(minitron.Options(top_k=8, intermediate="on"), teacher, teacher)
    ask, file, calls = objective.targets, work.scratch / "teacher-outputs.bin", []
    with_outputs(work.batches("train", 3), objective, teacher.module, work)
    wanted = file.read_bytes()
    for left in work.scratch.glob("teacher-outputs.*"):
        left.unlink()

    def stops(batch):
        calls.append(1)
        if len(calls) == 3:  # one for the layout, one that is kept
            raise KeyboardInterrupt
        return ask(batch)

    monkeypatch.setattr(objective, "targets", stops)
    with pytest.raises(KeyboardInterrupt):
        with_outputs(work.batches("train", 3), objective, teacher.module, work)
    with_outputs(work.batches("train", 3), objective, teacher.module, work)
    assert len(calls) == 3 + 1 + 2 and file.read_bytes() == wanted
