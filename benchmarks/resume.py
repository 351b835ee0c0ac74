"""Kill a small run at a hundred moments and compare what the same command then leaves.

    python benchmarks/resume.py [--trials 100] [--out DIR]

A trial starts the real `compress run` in a fresh directory and ends its process group with kill -9
(a third of the trials: twice), at a random moment or when something appears in the output
directory: a snapshot being written, a manifest, an export. Then the same command runs to its end.
Every weight file, the losses and the scratch must be those of a run that nobody interrupted.

Appends one cell per trial to docs/results/resume.jsonl, skips those that are there, and writes
docs/results/resume.md from all of them. About 20 seconds a trial.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from cells import Cells, place, table

import compressor

WORDS = ["stone", "river", "bread", "cloud", "lamp", "ship", "garden", "wolf", "paper", "song"]
PROFILE = """\
name: resume
stages:
  - prune.minitron: {sizes: {mlp: 32, layers: 2}, samples: 8, length: 16}
  - distill.latent: {train: &train {steps: 40, batch: 4, length: 16, lr: 1.0e-3, warmup: 2,
      accumulate: 2, precision: float32, snapshot_seconds: 0}}
  - distill.kd: {train: *train}
  - quantize.rtn: {bits: 8, group: 16}
  - export.safetensors
ONNX
baselines: {rounded: [{quantize.rtn: {bits: 8, group: 16}}, export.safetensors]}
measures: [size, fidelity]
"""
# ONNX takes most of the time of a run, so only every fourth trial has it
PROFILES = {"short": "", "onnx": "  - export.onnx"}
# What is waited for: a pattern below the output directory, and the longest wait after it in seconds
TARGETS = {
    "reading": (".lock", 0.5),
    "pruning": (".scratch/01-*/*.partial", 0.1),
    "saving prune": (".scratch/01-*/*.partial/*", 0.02),
    "teacher outputs": (".scratch/02-*/teacher-outputs.bin", 0.05),
    "training latent": (".scratch/02-*/metrics.jsonl", 0.5),
    "training kd": (".scratch/03-*/metrics.jsonl", 0.8),
    "writing a snapshot": (".scratch/0*/snapshot.partial/state.*", 0.002),
    "removing a snapshot": (".scratch/0*/snapshot.removed", 0.0),
    "saving distill": (".scratch/0[23]*/*.partial/*", 0.02),
    "manifest of kd": (".scratch/03-*/*.partial/manifest.json*", 0.0),
    "landed": ("03-*", 0.002),
    "quantizing": (".scratch/04-*/*.partial", 0.02),
    "saving quantize": (".scratch/04-*/*.partial/*", 0.01),
    "exporting": (".scratch/05-*/*.partial", 0.1),
    "baseline": (".scratch/baselines-*/*.partial", 0.1),
    "measuring": (".scratch/measures", 0.5),
    "measured": ("bench.json", 0.05),
    "reporting": ("report.json", 0.0),
}
ONNX_TARGETS = {
    "exporting onnx": (".scratch/06-*/*.partial", 8.0),
    "saving onnx": (".scratch/06-*/*.partial/model.onnx", 0.2),
    "manifest of onnx": (".scratch/06-*/*.partial/manifest.json*", 0.0),
}


def build(folder):
    """A pico Llama with a tokenizer of ten words, a text and two profiles."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    names = ["<pad>", "<unk>", "<s>", "</s>", ".", *WORDS]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "pico")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=len(names) + 1,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "pico")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=30)) + "." for _ in range(120)]
    (folder / "words.txt").write_text("\n\n".join(texts), encoding="utf-8")
    for name, line in PROFILES.items():
        (folder / f"{name}.yaml").write_text(PROFILE.replace("ONNX", line), encoding="utf-8")


def start(folder, profile, out):
    """`compress run` in a process group of its own."""
    command = [sys.executable, "-m", "compressor.cli.main", "run", str(folder / f"{profile}.yaml")]
    command += ["--model", str(folder / "pico"), "--data", str(folder / "words.txt")]
    return subprocess.Popen(
        [*command, "--out", str(out)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        text=True,
    )


def finish(folder, profile, out):
    """Run to the end."""
    process = start(folder, profile, out)
    said = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"exit {process.returncode}: {said}")


def kill_at(process, out, target, draw, longest):
    """Kill the process group at its moment; False when it had ended before."""
    if target == "random":
        wait(process, lambda: False, draw.uniform(0, longest))
    else:
        pattern, after = (TARGETS | ONNX_TARGETS)[target]
        wait(process, lambda: next(out.glob(pattern), None) is not None, 120)
        wait(process, lambda: False, draw.uniform(0, after))
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return alive


def wait(process, seen, seconds):
    """Until `seen()`, the end of the process or of the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not seen():
        time.sleep(0.0005)


def killed_in(out):
    """What the run was doing, from what it left: {stage kind or step} {phase}."""
    lock = out / ".lock"
    if not lock.is_file():
        return "start"
    place = lock.read_text(encoding="utf-8").partition("\n")[0].partition(" ")[2]
    if not place:
        return "reading and checking" if lock.stat().st_size else "start"
    if place == "measuring":
        return "report" if (out / "bench.json").is_file() else "measuring"
    kind = ("baseline " if place.startswith("baselines") else "") + place.partition("-")[2]
    if (out / place).is_dir():
        return f"{kind}: landed"
    scratch = place.replace("/", "-").replace(".", "-")
    found = [
        path.relative_to(top).as_posix()
        for top in out.glob(f".scratch/{scratch}.*")
        for path in top.rglob("*")
    ]
    snapshots = [name for name in found if name.startswith("snapshot.")]  # partial or removed
    saved = [name.partition(".partial/")[2] for name in found if not name.startswith("snapshot")]
    if "manifest.json" in " ".join(saved):
        return f"{kind}: manifest"
    if any(name.startswith(("model.", "packed.")) for name in saved):
        return f"{kind}: saving"
    if "export" in kind:
        return f"{kind}: exporting"
    if snapshots:
        return f"{kind}: snapshot"
    if "metrics.jsonl" in found:
        return f"{kind}: training"
    return f"{kind}: teacher outputs" if "teacher-outputs.bin" in found else f"{kind}: working"


def weights(out):
    """{file: sha256} of everything with weights in it, probes included."""
    files = [f for p in ("*.safetensors", "*.onnx", "*.onnx.data") for f in out.rglob(p)]
    return {
        str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in files
        if f.is_file()
    }


def losses(out):
    """(stage, step, loss) of every line of metrics."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(r["stage"], r["step"], r["loss"]) for r in map(json.loads, lines)]


def plan(number):
    """(profile, target) of a trial; every fourth one has ONNX."""
    if number % 4 == 3:
        return "onnx", [*ONNX_TARGETS, "random"][number // 4 % (len(ONNX_TARGETS) + 1)]
    mine = [*TARGETS, "random", "random"]
    return "short", mine[(number - number // 4) % len(mine)]


def trial(folder, number, references, profile, target):
    """One killed run against the reference of its profile; returns its cell."""
    draw = random.Random(number)
    reference, longest = references[profile]
    out = Path(tempfile.mkdtemp(dir=folder, prefix=f"trial-{number}-")) / "out"
    begin, phases, aim = time.perf_counter(), [], target
    while not phases:  # what lasts a millisecond is sometimes missed: another time, then
        shutil.rmtree(out, ignore_errors=True)
        if kill_at(start(folder, profile, out), out, target, draw, longest):
            phases.append(killed_in(out))
        target = "random"
    if draw.random() < 1 / 3 and kill_at(start(folder, profile, out), out, "random", draw, longest):
        phases.append(killed_in(out))
    finish(folder, profile, out)
    seconds = time.perf_counter() - begin
    wrong = [f for f, sha in weights(reference).items() if weights(out).get(f) != sha]
    wrong += [f for f in weights(out) if f not in weights(reference)]
    artefacts = [path for path in out.rglob("*-export.*") if path.is_dir()]
    cell = {
        "profile": profile,
        "target": aim,
        "killed": phases,
        "seconds": round(seconds, 1),
        "files": len(weights(reference)),
        "different": wrong,
        "losses": losses(out) == losses(reference),
        "verified": all(compressor.verify(path)["ok"] for path in artefacts),
        "scratch": [p.name for p in out.glob(".scratch*")],
    }
    cell["identical"] = not wrong and not cell["scratch"] and cell["losses"] and cell["verified"]
    if cell["identical"]:
        shutil.rmtree(out.parent)
    return cell


def reference_runs(folder, profiles):
    """{profile: (directory of an uninterrupted run, its seconds)}."""
    found = {}
    for profile in profiles:
        begin = time.perf_counter()
        finish(folder, profile, folder / f"reference-{profile}")
        found[profile] = folder / f"reference-{profile}", time.perf_counter() - begin
    return found


def page(cells):
    """The results page: the command, the machine, and kills per phase."""
    cells = [cells.found[number] for number in sorted(cells.found)]
    machine = cells[-1]["machine"] | {"threads": 1}  # of the runs, not of this script
    killed = collections.Counter(phase for c in cells for phase in c["killed"])
    failed = collections.Counter(p for c in cells if not c["identical"] for p in c["killed"])
    seconds = [c["seconds"] for c in cells]
    rows = [[p, str(n), str(n - failed[p]), str(failed[p])] for p, n in sorted(killed.items())]
    blocks = [
        "# Resume: kill -9 at any moment, the same command again",
        "```\npython benchmarks/resume.py\n```",
        f"{cells[-1]['date']}; {place(machine, cells[-1]['packages'])}",
        __doc__.split("\n\n")[2],
        f"**{sum(c['identical'] for c in cells)} of {len(cells)} trials are identical**: "
        f"{sum(killed.values())} kills, {statistics.median(seconds):.0f} s a trial (median; "
        f"longest {max(seconds):.0f} s), {sum(c['files'] for c in cells):,} files compared by "
        "sha256. A trial that was killed twice counts once for each phase.",
        table(["killed in", "kills", "identical", "failures"], rows),
    ]
    return "\n\n".join(blocks) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folder = given.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    cells = Cells("resume")
    missing = [n for n in range(given.trials) if n not in cells.found]
    if missing:
        build(folder)
        references = reference_runs(folder, PROFILES)
    for number in missing:
        cell = cells.run(number, partial(trial, folder, number, references, *plan(number)))
        said = "identical" if cell["identical"] else f"DIFFERENT {cell}"
        print(f"  killed in {cell['killed']}: {said}", flush=True)
    cells.page.write_text(page(cells), encoding="utf-8")
    sys.exit(not all(cell["identical"] for cell in cells.found.values()))


if __name__ == "__main__":
    main()
