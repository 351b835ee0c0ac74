"""A disk that fills up and memory that runs out: a sentence, nothing lost, the same bits after."""

import errno
import shutil
import subprocess

import pytest

import compressor
from compressor.errors import CompressError
from compressor.model.manifest import file_digest, read_manifest
from compressor.run import kinds, preflight
from compressor.run.shortage import Shortage, shortage, shortages
from compressor.training import loop, teacher

PROFILE = """\
name: short of everything
stages:
  - prune.minitron: {sizes: {mlp: 32, layers: 2}, samples: 8, length: 16}
  - distill.latent: {train: {steps: 5, batch: 4, length: 16, warmup: 1, precision: float32,
      snapshot_seconds: 0}}
  - quantize.rtn: {bits: 8, group: 16}
  - export.safetensors
measures: [size]
"""
STAGES = ["01-prune.minitron", "02-distill.latent", "03-quantize.rtn", "04-export.safetensors"]


@pytest.fixture
def arguments(llama_folder, text_file, tmp_path):
    """Of `compressor.run`, but for the directory."""
    (tmp_path / "short.yaml").write_text(PROFILE)
    return {
        "profile": tmp_path / "short.yaml",
        "model": str(llama_folder),
        "data": str(text_file),
    }


@pytest.fixture
def small_disk(tmp_path):
    """Factory: `small_disk(bytes)` mounts a file system, or gives a mounted one another size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size):
        remount = "remount," if place.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={size}", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        return place

    if shutil.which("mount") is None:
        pytest.skip("a small disk cannot be mounted here: there is no `mount`")
    yield mount
    if place.is_mount():
        unmount(place)


def unmount(place):
    """Also while the frames of a caught error hold a memory map."""
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def digests(home):
    return {f.relative_to(home): file_digest(f) for f in home.rglob("*.safetensors") if f.is_file()}


def test_a_disk_that_fills_up_anywhere(arguments, small_disk, tmp_path, monkeypatch):
    """Another program takes the space that preflight found free."""
    monkeypatch.setattr(preflight, "disk_free", lambda _: 2**40)
    monkeypatch.setattr(teacher, "_refuse_small_disk", lambda *_: None)
    whole = compressor.run(**arguments, out=tmp_path / "whole").path
    wanted = digests(whole)
    # in pages, as a tmpfs counts: less than this cannot be enough
    total = sum(-(-file.stat().st_size // 4096) for file in whole.rglob("*") if file.is_file())
    said, kept = set(), []
    for share in (0.02, 0.5, 0.95):
        out = small_disk(4096 * int(total * share)) / "out"
        with pytest.raises(Shortage) as caught:
            compressor.run(**arguments, out=out)
        assert "No space left" in caught.value.what and caught.value.exit_code == 2
        assert "the same command then continues" in caught.value.hint
        said.add(caught.value.what)
        kept.append(sum((out / name).is_dir() for name in STAGES))
        small_disk(2**26)
        assert compressor.run(**arguments, out=out).artifacts
        assert digests(out) == wanted
        unmount(out.parent)
    assert len(said) >= 2 and kept == sorted(kept) and kept[-1] > 0, (said, kept)


@pytest.mark.parametrize("stage", STAGES)
def test_too_little_memory_in_a_stage(arguments, tmp_path, monkeypatch, stage):
    out = tmp_path / "out"
    error = RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    )
    done, method = [], kinds.load_method

    def fail(*_):
        raise error

    def exhausted(model, directory, *rest):
        if stage in directory.name:
            raise error
        return save(model, directory, *rest)

    save = kinds.save_and_prove
    with monkeypatch.context() as patch:
        if "distill" in stage:
            patch.setattr(loop, "_clip", fail)
        elif "export" in stage:
            patch.setattr(method("export.safetensors"), "run", fail)
        else:
            patch.setattr(kinds, "save_and_prove", exhausted)
        with pytest.raises(Shortage, match=f"not enough memory in {stage}") as caught:
            compressor.run(**arguments, out=out)
    done = [name for name in STAGES if (out / name).is_dir()]
    assert done == STAGES[: STAGES.index(stage)]
    wanted = {
        "01-prune.minitron": "--set stages.1.length=8",
        "02-distill.latent": "--set stages.2.train.batch=2 --set stages.2.train.accumulate=2",
    }
    assert caught.value.hint.startswith(wanted.get(stage, "free memory"))


def test_a_run_goes_on_after_memory_ran_out(arguments, tmp_path, monkeypatch):
    wanted = digests(compressor.run(**arguments, out=tmp_path / "whole").path)
    clip, steps_done = loop._clip, []

    def exhausted(*rest):
        steps_done.append(rest)
        if len(steps_done) == 3:
            raise MemoryError
        return clip(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_clip", exhausted)
        with pytest.raises(Shortage, match=r"not enough memory in 02-distill\.latent"):
            compressor.run(**arguments, out=tmp_path / "out")
    again = compressor.run(**arguments, out=tmp_path / "out")
    assert digests(again.path) == wanted
    assert "resuming after step 2" in (again.path / "log.txt").read_text()
    assert not (again.path / ".scratch").exists()
    assert read_manifest(again.path / STAGES[1]).metrics["notes"]["training"]["steps"] == 5


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "could not write x (No space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "could not write x (No space"),
        (OSError(errno.EROFS, "Read-only file system"), "could not write x (Read-only file system"),
        (ValueError("I/O error: No space left on device (os error 28)"), "could not write x"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory in x"),
        (MemoryError(), "not enough memory in x"),
        (RuntimeError("std::bad_alloc"), "not enough memory in x"),
        (RuntimeError("Failed to allocate memory for requested buffer"), "not enough memory in x"),
        (CompressError("cannot load 'm': can't allocate memory", "get it again"), "not enough"),
        (RuntimeError("could not create a primitive"), "not enough memory in x"),
    ],
)
def test_libraries_say_it_in_their_own_ways(error, what):
    with pytest.raises(Shortage) as caught, shortages("outer"), shortages("x"):
        raise error
    assert caught.value.what.startswith(what)


def test_a_shortage_behind_another_error_is_found():
    with pytest.raises(Shortage, match="could not write x"), shortages("x"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("the export failed") from error


def test_other_errors_are_left_alone():
    assert shortage(ValueError("a memory of things past")) is None
    with pytest.raises(CompressError, match="no text") as caught, shortages("x"):
        raise CompressError("no text")
    assert not isinstance(caught.value, Shortage)
