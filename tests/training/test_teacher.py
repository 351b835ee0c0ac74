"""Teacher outputs on disk: equal to asking the teacher, asked once, never another teacher's."""

import pytest
import torch

from compressor.errors import CompressError
from compressor.training import teacher
from compressor.training.teacher import given_outputs, with_outputs


class Asks:
    cache_teacher = True

    def __init__(self, module):
        self.module, self.rows = module, 0

    def targets(self, batch):
        self.rows += len(batch["input_ids"])
        states = self.module(**{k: batch[k] for k in ("input_ids", "attention_mask")})
        return {"a": states.last_hidden_state, "b": states.last_hidden_state[..., :3] * 2}


@pytest.fixture
def batches(make_work):
    """Three batches of two rows each; the third repeats rows of the first two."""
    first, second = make_work(batch=2).batches("train", 2)
    first, second = first | {"row": torch.tensor([4, 9])}, second | {"row": torch.tensor([2, 7])}
    pairs = {k: torch.stack([first[k][1], second[k][0]]) for k in first}
    return [first, second, pairs]


def test_cached_outputs_are_the_teacher_s(pico_bert, make_work, batches):
    model, work, log = pico_bert(), None, []
    work = make_work(log=log)
    asks = Asks(model.module)
    cached = with_outputs(batches, asks, model.module, work)
    assert len(cached) == 3 and "MB of disk" in log[0]
    assert asks.rows == 2 + 4  # the first batch is asked for the widths, then every row once
    for batch, plain in zip(cached, batches, strict=True):
        with torch.no_grad():
            wanted = Asks(model.module).targets(plain)
        got, real = given_outputs(batch), plain["attention_mask"].bool()
        assert set(got) == {"a", "b"}
        for name in wanted:
            error = (got[name] - wanted[name])[real].abs() / wanted[name][real].abs()
            assert error.max() < 2**-10
            assert not got[name][~real].any()
    again = Asks(model.module)
    with_outputs(batches, again, model.module, make_work())
    assert again.rows == 2  # only the widths


def test_another_teacher_or_other_rows_are_asked_anew(pico_bert, make_work, batches):
    model, other = pico_bert(), pico_bert(seed=1)
    with_outputs(batches, Asks(model.module), model.module, make_work())
    asks = Asks(other.module)
    found = with_outputs(batches, asks, other.module, make_work())
    assert asks.rows == 6
    with torch.no_grad():
        wanted = asks.targets(batches[0])["a"]
    real = batches[0]["attention_mask"].bool()
    assert torch.allclose(given_outputs(found[0])["a"][real], wanted[real], rtol=1e-3, atol=1e-3)
    asks = Asks(other.module)
    with_outputs(batches[:2], asks, other.module, make_work())
    assert asks.rows == 2  # the same rows
    asks = Asks(other.module)
    with_outputs(batches[1:], asks, other.module, make_work())
    assert asks.rows == 5


def test_an_unfinished_file_is_not_used(pico_bert, make_work, batches, monkeypatch):
    model, work = pico_bert(), make_work()

    def stop(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "_refuse_overflow", stop)
        with pytest.raises(KeyboardInterrupt):
            with_outputs(batches, Asks(model.module), model.module, work)
    asks = Asks(model.module)
    with_outputs(batches, asks, model.module, work)
    assert asks.rows == 6


def test_asking_goes_on_after_the_last_flushed_batch(pico_bert, make_work, batches, monkeypatch):
    model, work = pico_bert(), make_work()
    monkeypatch.setattr(teacher, "_FLUSH_SECONDS", 0)
    with_outputs(batches, Asks(model.module), model.module, work)
    wanted = (work.scratch / "teacher-outputs.bin").read_bytes()
    for name in ("teacher-outputs.bin", "teacher-outputs.json"):
        (work.scratch / name).unlink()

    class Stops(Asks):
        def targets(self, batch):
            if self.rows == 4:  # one batch for the widths, one that is kept
                raise KeyboardInterrupt
            return super().targets(batch)

    with pytest.raises(KeyboardInterrupt):
        with_outputs(batches, Stops(model.module), model.module, work)
    with (work.scratch / "teacher-outputs.bin").open("ab") as file:
        file.write(b"half a batch that nobody flushed")
    asks = Asks(model.module)
    with_outputs(batches, asks, model.module, work)
    assert asks.rows == 2 + 2  # the widths, and the second batch; the third has no new rows
    assert (work.scratch / "teacher-outputs.bin").read_bytes() == wanted


def test_overflow_and_a_full_disk_are_refused(pico_bert, make_work, batches, monkeypatch):
    model = pico_bert()
    model.module.encoder.layer[-1].output.LayerNorm.bias.data += 1e6
    with pytest.raises(CompressError, match="beyond the range of float16"):
        with_outputs(batches, Asks(model.module), model.module, make_work())
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CompressError, match="GB of disk"):
        with_outputs(batches, Asks(model.module), model.module, make_work())
