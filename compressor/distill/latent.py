"""Distillation of representations: hidden states, sentence embeddings, attention maps.

    L = a |h_s - h_t|^2 / |h_t|^2  +  b (1 - cos(e_s, e_t))  +  c mean_m |W h_s^m - h_t^m|^2 / ...
        + d (same, embeddings)  +  g mean_m KL(A_t^m | A_s^m)

with h the last hidden state of real tokens, e the pooled sentence embedding, m mapped pairs of
layers, A attention maps, W a learned map where widths differ (TinyBERT, arXiv 1909.10351, maps
layers uniformly and matches states, embeddings and attention; we normalise each state loss by the
teacher's energy so that the weights need no tuning per layer).
Legend: L chosen layers, B rows, S tokens, H width of the teacher.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from compressor.distill.runner import backbone, refuse_other_vocabulary
from compressor.errors import CompressError
from compressor.model.model import Model, pool
from compressor.options import options
from compressor.training.options import Train
from compressor.training.parallel import team
from compressor.training.teacher import given_outputs


@options
class Options:
    """Distillation of representations; weights of 0 switch a part off."""

    train: Train = Field(Train(), description="how long and how fast")
    hidden: float = Field(1.0, ge=0, description="weight of the last hidden state")
    sentence: float = Field(
        1.0, ge=0, description="weight of the pooled embedding, if there is one"
    )
    layers: float = Field(0.0, ge=0, description="weight of the mapped hidden states")
    embeddings: float = Field(0.0, ge=0, description="weight of the embeddings' output")
    attention: float = Field(0.0, ge=0, description="weight of the mapped attention maps")
    layer_map: Literal["uniform", "last"] | list[tuple[int, int]] = Field(
        "uniform", description="uniform, last, or pairs [teacher layer, student layer] from 1"
    )
    freeze_embeddings: bool = Field(False, description="leave the token tables as they are")
    cache_teacher: bool = Field(True, description="compute the teacher's states once, on disk")


def objective(options: Options, student: Model, teacher: Model | None) -> nn.Module:
    """Weighted distances between the student's and the teacher's representations.

    Raises:
        CompressError: all weights are 0, vocabularies differ, a pair names no layer, or
            attention maps cannot be compared.
    """
    assert teacher is not None
    parts = ("hidden", "layers", "embeddings", "attention")
    if not any(getattr(options, p) for p in parts) and not (options.sentence and student.pooling):
        raise CompressError(
            "every weight of distill.latent is 0, or is of a sentence embedding that this model "
            "does not have",
            f"set one of {', '.join(parts)}",
        )
    refuse_other_vocabulary(student, teacher)
    if options.attention and student.sizes["heads"] != teacher.sizes["heads"]:
        raise CompressError(
            f"attention maps need equal head counts ({student.sizes['heads']} and "
            f"{teacher.sizes['heads']})",
            "set attention: 0",
        )
    return _Representations(options, student, teacher)


def _pairs(options: Options, student: int, teacher: int) -> list[tuple[int, int]]:
    """Mapped (teacher layer, student layer), counted from 1."""
    if options.layer_map == "uniform":
        return [(round(i * teacher / student), i) for i in range(1, student + 1)]
    if options.layer_map == "last":
        return [(teacher, student)]
    if not options.layer_map:
        raise CompressError("layer_map names no pair of layers", "layer_map: uniform")
    for above, below in options.layer_map:
        if not (1 <= above <= teacher and 1 <= below <= student):
            raise CompressError(
                f"layer_map pair [{above}, {below}]: the teacher has layers 1 to {teacher}, "
                f"the student 1 to {student}",
                "layer_map: uniform",
            )
    return [(above, below) for above, below in options.layer_map]


class _Representations(nn.Module):
    def __init__(self, options: Options, student: Model, teacher: Model) -> None:
        super().__init__()
        self.options, self.student, self.teacher = options, student, teacher
        depth = student.sizes["layers"], teacher.sizes["layers"]
        self.pairs = _pairs(options, *depth)
        # (weight, teacher layer, student layer); layer 0 is the output of the embeddings
        share = options.layers / len(self.pairs)
        matched = [(options.hidden, depth[1], depth[0]), (options.embeddings, 0, 0)]
        matched += [(share, above, below) for above, below in self.pairs]
        self.matched = [m for m in matched if m[0]]
        self.wanted = sorted({above for _, above, _ in self.matched} | {depth[1]})
        self.cache_teacher = options.cache_teacher and not options.attention
        width = student.sizes["hidden"], teacher.sizes["hidden"]
        self.lift = nn.Identity() if width[0] == width[1] else nn.Linear(*width, bias=False)
        self.parts: dict[str, Tensor] = {}  # of the last loss, for the metrics

    @torch.no_grad()
    def targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hidden states [B, S, H] of the teacher's layers that the loss needs, by number."""
        states = backbone(self.teacher, batch, output_hidden_states=True).hidden_states
        return {str(layer): states[layer].float() for layer in self.wanted}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        extra = {"output_attentions": True} if self.options.attention else {}
        with _maps_kept(self.student, bool(self.options.attention)):
            output = backbone(self.student, batch, output_hidden_states=True, **extra)
        target = given_outputs(batch) or self.targets(batch)
        real = batch["attention_mask"].bool()
        self.parts = {}
        terms = []
        for weight, above, below in self.matched:
            own = self.lift(output.hidden_states[below]).float()[real]
            terms.append(weight * _relative(own, target[str(above)][real]))
            self.parts[f"state {below}"] = terms[-1].detach()
        pooling, mask = self.student.pooling, batch["attention_mask"]
        if self.options.sentence and pooling is not None:
            own = pool(self.lift(output.last_hidden_state).float(), mask, pooling)
            above = pool(target[str(self.wanted[-1])], mask, pooling)
            terms.append(self.options.sentence * (1 - cosine_similarity(own, above)).mean())
            self.parts["sentence"] = terms[-1].detach()
        if self.options.attention:
            terms.append(self.options.attention * self._attention(batch, output.attentions))
            self.parts["attention"] = terms[-1].detach()
        return torch.stack(terms).sum()

    @torch.no_grad()
    def _teacher_maps(self, batch: dict[str, Tensor]) -> Any:
        with _maps_kept(self.teacher, True):
            return backbone(self.teacher, batch, output_attentions=True).attentions

    def _attention(self, batch: dict[str, Tensor], maps: Any) -> Tensor:
        """Mean KL between attention rows of real tokens, over heads and mapped layers."""
        above, total = self._teacher_maps(batch), maps[0].new_zeros((), dtype=torch.float32)
        rows = batch["attention_mask"].bool()[:, None, :].expand(maps[0].shape[:3])
        for teacher, student in self.pairs:
            target, own = above[teacher - 1].float()[rows], maps[student - 1].float()[rows]
            log_ratio = (target.clamp(min=1e-9) / own.clamp(min=1e-9)).log()
            total = total + (target * log_ratio).sum(-1).mean()
        return total / len(self.pairs)


@contextmanager
def _maps_kept(model: Model, wanted: bool) -> Iterator[None]:
    """Eager attention, the only one that returns its maps, for one forward pass."""
    module: Any = model.module
    before = module.config._attn_implementation
    if wanted:
        module.set_attn_implementation("eager")
    try:
        yield
    finally:
        if wanted:
            module.set_attn_implementation(before)


def _relative(own: Tensor, target: Tensor) -> Tensor:
    """Squared distance over the target's energy, that of all processes."""
    energy = target.square().sum()
    team().average([energy])
    return (own - target).square().sum() / energy
