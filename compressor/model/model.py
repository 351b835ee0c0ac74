"""The in-memory model every method sees: never a path, never the CLI."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from compressor.model.beside import TensorFile
from compressor.model.families import Family, Stack
from compressor.model.manifest import WeightFormat

# by the end of a class's name; the first that fits counts
TASKS = (
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
    ("ForSequenceClassification", "text-classification"),
    ("ForMaskedLM", "fill-mask"),
    ("WhisperForConditionalGeneration", "speech-seq2seq"),
    ("ForConditionalGeneration", "seq2seq-lm"),
    ("ForImageClassification", "image-classification"),
    ("ForImageClassificationWithTeacher", "image-classification"),
)
CLASSIFIERS = ("text-classification", "image-classification")


def task_of(class_name: str) -> str:
    """Task of a transformers class by its name; a class without a head extracts features."""
    return next((t for suffix, t in TASKS if class_name.endswith(suffix)), "feature-extraction")


@dataclass(frozen=True)
class Pooling:
    """How a sentence encoder turns token states into one vector (sentence-transformers files)."""

    mode: str  # mean | cls | max
    normalize: bool


@dataclass
class Model:
    """A loaded checkpoint. Methods edit `module`, `formats` and `notes` in place.

    Attributes:
        module: a transformers model, float32 or with Quant modules, dropout off.
        family: its row of the table.
        processor: the tokenizer, or None when the checkpoint has none.
        formats: {module name: WeightFormat} of every module that is not dense float.
        pooling: set for sentence encoders.
        source_dtype: the dtype the checkpoint was stored in and will be saved in.
        notes: JSON-able findings of a stage, saved in manifest.metrics for the report,
            e.g. {"importance": {"layers": [...]}}.
        beside: {file name: tensors} that a stage leaves in its directory.
    """

    module: nn.Module
    family: Family
    processor: Any
    formats: dict[str, WeightFormat] = field(default_factory=dict)
    pooling: Pooling | None = None
    source_dtype: str = "float32"
    notes: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, TensorFile] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The transformers config of the module."""
        return self.module.config

    @property
    def base(self) -> nn.Module:
        """The backbone, without a task head."""
        backbone = self.module.base_model
        assert isinstance(backbone, nn.Module)
        return backbone

    @property
    def task(self) -> str:
        """One of TASKS, e.g. causal-lm, or feature-extraction."""
        return task_of(type(self.module).__name__)

    @property
    def sizes(self) -> dict[str, int]:
        """{hidden, layers, heads, kv_heads, head_dim, mlp, vocabulary}; see Family.read_sizes."""
        return self.family.read_sizes(self.config)

    def blocks(self, stack: Stack) -> nn.ModuleList:
        """The list of blocks of one stack."""
        found = self.base.get_submodule(stack.blocks)
        assert isinstance(found, nn.ModuleList)
        return found


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Sentence embedding [B, H] from token states [B, S, H] and an attention mask [B, S]."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    if pooling.mode == "cls":
        vector = hidden[:, 0]
    elif pooling.mode == "max":
        vector = hidden.masked_fill(weight == 0, float("-inf")).amax(dim=1)
    else:
        vector = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)
    return nn.functional.normalize(vector, dim=-1) if pooling.normalize else vector
