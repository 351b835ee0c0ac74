"""The few lines of Python that open an artefact, one text for every kind of it."""

from compressor.engines import GGUF, OUTPUTS
from compressor.model.families import find_family
from compressor.model.manifest import Manifest

ENCODER_USAGE = """\
import onnxruntime, transformers
tokens = transformers.AutoTokenizer.from_pretrained(DIR)(["a sentence"], return_tensors="np")
vectors = onnxruntime.InferenceSession(DIR + "/model.onnx").run(["{output}"], {{**tokens}})[0]"""

IMAGE_USAGE = """\
import onnxruntime, PIL.Image, transformers
read, picture = transformers.AutoImageProcessor.from_pretrained(DIR), PIL.Image.new("RGB", (99, 99))
pixels = read(picture, return_tensors="np")
found = onnxruntime.InferenceSession(DIR + "/model.onnx").run(["{output}"], {{**pixels}})[0]"""

DECODER_USAGE = """\
import compressor, transformers
engine, tokenizer = compressor.open_engine(DIR), transformers.AutoTokenizer.from_pretrained(DIR)
print(tokenizer.decode(compressor.generate(engine, tokenizer("Once upon a time").input_ids, 60)))"""

GENAI_USAGE = """\
import numpy, onnxruntime_genai as og, transformers
model, tokenizer = og.Model(DIR), transformers.AutoTokenizer.from_pretrained(DIR)
settings = og.GeneratorParams(model)
settings.set_search_options(max_length=64)
writer = og.Generator(model, settings)
writer.append_tokens(numpy.array([tokenizer("Once upon a time").input_ids], dtype=numpy.int32))
while not writer.is_done():
    writer.generate_next_token()
print(tokenizer.decode(writer.get_sequence(0)))"""

SEQ2SEQ_USAGE = """\
import compressor, transformers
engine, tokenizer = compressor.open_engine(DIR), transformers.AutoTokenizer.from_pretrained(DIR)
source = tokenizer("a sentence", return_tensors="pt")
print(tokenizer.decode(compressor.generate(engine, [], 60, tokenizer.eos_token_id, source)))"""

SPEECH_USAGE = """\
import compressor, numpy, transformers
engine, tokenizer = compressor.open_engine(DIR), transformers.AutoTokenizer.from_pretrained(DIR)
hear = transformers.AutoFeatureExtractor.from_pretrained(DIR)
source = hear(numpy.zeros(16000), sampling_rate=16000, return_tensors="pt")
print(tokenizer.decode(compressor.generate(engine, [], 60, tokenizer.eos_token_id, source)))"""

TORCH_USAGE = """\
from transformers import {auto}, AutoTokenizer
model, tokenizer = {auto}.from_pretrained(DIR), AutoTokenizer.from_pretrained(DIR)
print({call}(**tokenizer("a sentence", return_tensors="pt")))"""

PACKED_USAGE = """\
import compressor, transformers
engine, tokenizer = compressor.open_engine(DIR), transformers.AutoTokenizer.from_pretrained(DIR)
print(engine.outputs({**tokenizer(["a sentence"], return_tensors="pt")}))"""

PACKED_IMAGE_USAGE = """\
import compressor, PIL.Image, transformers
engine, read = compressor.open_engine(DIR), transformers.AutoImageProcessor.from_pretrained(DIR)
print(engine.outputs({**read(PIL.Image.new("RGB", (99, 99)), return_tensors="pt")}))"""

TORCH_SPEECH_USAGE = """\
import numpy
from transformers import {auto}, AutoFeatureExtractor
model, hear = {auto}.from_pretrained(DIR), AutoFeatureExtractor.from_pretrained(DIR)
print(model.generate(**hear(numpy.zeros(16000), sampling_rate=16000, return_tensors="pt")))"""

TORCH_IMAGE_USAGE = """\
import PIL.Image
from transformers import {auto}, AutoImageProcessor
model, read = {auto}.from_pretrained(DIR), AutoImageProcessor.from_pretrained(DIR)
print(model(**read(PIL.Image.new("RGB", (99, 99)), return_tensors="pt")))"""

LLAMA_USAGE = """\
import llama_cpp
model = llama_cpp.Llama(DIR + "/model.gguf", verbose=False)
print(model("Once upon a time", max_tokens=60)["choices"][0]["text"])"""

OUR_CLASSES = "compressor.model.qsd_modeling"  # registers them with transformers

IDS_USAGE = """\
import compressor, torch
engine, ids = compressor.open_engine(DIR), torch.tensor([[1, 2, 3]])
print(engine.outputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}))"""

PIXELS_USAGE = """\
import compressor, torch
engine, pixels = compressor.open_engine(DIR), torch.zeros({shape})
print(engine.outputs({{"pixel_values": pixels}}))"""

DECODER_IDS_USAGE = """\
import compressor
engine = compressor.open_engine(DIR)
print(compressor.generate(engine, [1, 2, 3], 60))"""

SEQ2SEQ_IDS_USAGE = """\
import compressor, torch
engine, ids = compressor.open_engine(DIR), torch.tensor([[1, 2, 3]])
source = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
print(compressor.generate(engine, [], 60, source=source))"""

SPEECH_IDS_USAGE = """\
import compressor, numpy, transformers
engine, hear = compressor.open_engine(DIR), transformers.AutoFeatureExtractor.from_pretrained(DIR)
source = hear(numpy.zeros(16000), sampling_rate=16000, return_tensors="pt")
print(compressor.generate(engine, [], 60, source=source))"""

LLAMA_ENCODER_USAGE = """\
import llama_cpp
model = llama_cpp.Llama(DIR + "/model.gguf", embedding=True, verbose=False)
print(model.embed("a sentence"))"""

# task: (auto class, how an exported file is used, how plain transformers uses a checkpoint)
_USAGES = {
    "causal-lm": ("AutoModelForCausalLM", DECODER_USAGE, TORCH_USAGE),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", SEQ2SEQ_USAGE, TORCH_USAGE),
    "speech-seq2seq": ("AutoModelForSpeechSeq2Seq", SPEECH_USAGE, TORCH_SPEECH_USAGE),
    "image-classification": ("AutoModelForImageClassification", IMAGE_USAGE, TORCH_IMAGE_USAGE),
    "text-classification": ("AutoModelForSequenceClassification", ENCODER_USAGE, TORCH_USAGE),
    "fill-mask": ("AutoModelForMaskedLM", ENCODER_USAGE, TORCH_USAGE),
    "feature-extraction": ("AutoModel", ENCODER_USAGE, TORCH_USAGE),
}
# of what only compress reads whole: these name an engine, the others serve as they are
_IDS_USAGES = {
    "causal-lm": DECODER_IDS_USAGE,
    "seq2seq-lm": SEQ2SEQ_IDS_USAGE,
    "speech-seq2seq": SPEECH_IDS_USAGE,
}
PLAIN = ("torch", "transformers")  # engines of what transformers opens
_PACKED_USAGES = {ENCODER_USAGE: PACKED_USAGE, IMAGE_USAGE: PACKED_IMAGE_USAGE}


def usage(manifest: Manifest, task: str) -> str:
    """A few lines of working Python that use an artefact; DIR stands for its folder.

    Where nothing is there that turns text or pictures into what the model takes,
    metrics.raw_inputs is the shape of that: ids [B, S] or pixels [B, C, height, width].
    """
    auto, exported, plain = _USAGES[task]
    raw = manifest.metrics.get("raw_inputs")
    if find_family(manifest.family).sizes.vocabulary is None:  # also without a head
        exported, plain = IMAGE_USAGE, TORCH_IMAGE_USAGE
        if raw is not None:
            return PIXELS_USAGE.format(shape=", ".join(map(str, raw)))
    elif raw is not None:
        return _IDS_USAGES.get(task, IDS_USAGE)
    if manifest.engine in GGUF:
        return _llama_usage(manifest, task)
    sided = any(form.side_rank is not None for form in manifest.formats.values())
    own = manifest.metrics.keys() & {"packed", "huffman"}
    if own or (sided and manifest.engine == "torch"):
        return _PACKED_USAGES.get(exported, exported)
    if manifest.engine in PLAIN:
        call = "model.generate" if task == "seq2seq-lm" else "model"
        known = f"import {OUR_CLASSES}\n" if manifest.family == "qsd_transformer" else ""
        return known + plain.format(auto=auto, call=call)
    if manifest.engine == "onnxruntime-genai":
        return GENAI_USAGE
    found = manifest.metrics["agreement"]
    return exported.format(output=next(name for name in OUTPUTS if name in found))


def _llama_usage(manifest: Manifest, task: str) -> str:
    if manifest.metrics["tokenizer"] == "none":
        return _IDS_USAGES.get(task, IDS_USAGE)
    return LLAMA_USAGE if task == "causal-lm" else LLAMA_ENCODER_USAGE
