"""Distillation of representations: hidden states, sentence embeddings, attention maps.

    L = a |h_s - h_t|^2 / |h_t|^2  +  b (1 - cos(e_s, e_t))  +  c mean_m |W h_s^m - h_t^m|^2 / ...
        + d (same, embeddings)  +  g mean_m KL(A_t^m | A_s^m)

with h the last hidden state of real tokens or patches (of encoder and decoder alike, where there
are both: every state term is then the mean of the two), e the pooled sentence embedding, m mapped
pairs of layers, A attention maps, W a learned map where widths differ (TinyBERT, arXiv 1909.10351,
maps layers uniformly and matches states, embeddings and attention; we normalise each state loss by
the teacher's energy so that the weights need no tuning per layer).
Legend: B rows, S tokens, H width of the teacher.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from compressor.distill.runner import backbone, refuse_other_vocabulary
from compressor.distill.states import depths, real_positions, refuse_other_patches, states_of
from compressor.errors import CompressError
from compressor.model.model import Model, pool
from compressor.options import options
from compressor.training.options import Train
from compressor.training.parallel import team
from compressor.training.reading import kind_of
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
    _refuse_two_stacks(options, student)
    refuse_other_patches(student, teacher)
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


def _refuse_two_stacks(options: Options, model: Model) -> None:
    if len(model.family.stacks) == 1:
        return
    if options.attention:
        raise CompressError(
            "attention maps of an encoder-decoder are not compared", "set attention: 0"
        )
    if isinstance(options.layer_map, list):
        raise CompressError(
            "pairs in layer_map name the layers of one stack, and this model has two",
            "layer_map: uniform",
        )


def caches(options: Options, task: str, config: Any) -> bool:
    """Whether the teacher's states are kept on disk: only where a row is always the same text."""
    text = kind_of(config) == "text" and task != "fill-mask"
    return options.cache_teacher and not options.attention and text


class _Representations(nn.Module):
    def __init__(self, options: Options, student: Model, teacher: Model) -> None:
        super().__init__()
        self.options, self.student, self.teacher = options, student, teacher
        # (weight, stack, teacher layer, student layer); layer 0 is the output of the embeddings
        self.matched: list[tuple[float, int, int, int]] = []
        self.pairs: list[tuple[int, int]] = []  # of the last stack
        for stack, (own, above) in enumerate(zip(depths(student), depths(teacher), strict=True)):
            self.pairs = _pairs(options, own, above)
            share = options.layers / len(self.pairs)
            terms = [(options.hidden, above, own), (options.embeddings, 0, 0)]
            terms += [(share, *pair) for pair in self.pairs]
            count = len(student.family.stacks)
            self.matched += [(w / count, stack, t, s) for w, t, s in terms if w]
        self.last = (len(student.family.stacks) - 1, depths(teacher)[-1])
        self.wanted = sorted({(stack, above) for _, stack, above, _ in self.matched} | {self.last})
        self.cache_teacher = caches(options, student.task, student.config)
        width = student.sizes["hidden"], teacher.sizes["hidden"]
        self.lift = nn.Identity() if width[0] == width[1] else nn.Linear(*width, bias=False)
        self.parts: dict[str, Tensor] = {}  # of the last loss, for the metrics

    @torch.no_grad()
    def targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hidden states [B, S, H] of the teacher's layers that the loss needs, by stack.layer."""
        states = states_of(backbone(self.teacher, batch, output_hidden_states=True))
        return {f"{stack}.{layer}": states[stack][layer].float() for stack, layer in self.wanted}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        extra = {"output_attentions": True} if self.options.attention else {}
        with _maps_kept(self.student, bool(self.options.attention)):
            output = backbone(self.student, batch, output_hidden_states=True, **extra)
        target = given_outputs(batch) or self.targets(batch)
        states = states_of(output)
        masks = real_positions(self.student, batch, states)
        self.parts = {}
        terms = []
        for weight, stack, above, below in self.matched:
            real = masks[stack]
            own = self.lift(states[stack][below]).float()[real]
            terms.append(weight * _relative(own, target[f"{stack}.{above}"][real]))
            name = f"state {below}" if len(masks) == 1 else f"state {stack}.{below}"
            self.parts[name] = self.parts.get(name, 0) + terms[-1].detach()
        pooling = self.student.pooling
        if self.options.sentence and pooling is not None:
            mask = batch["attention_mask"]
            own = pool(self.lift(output.last_hidden_state).float(), mask, pooling)
            above = pool(target["{}.{}".format(*self.last)], mask, pooling)
            terms.append(self.options.sentence * (1 - cosine_similarity(own, above)).mean())
            self.parts["sentence"] = terms[-1].detach()
        if self.options.attention:
            maps = self._attention(batch, masks[0], output.attentions)
            terms.append(self.options.attention * maps)
            self.parts["attention"] = terms[-1].detach()
        return torch.stack(terms).sum()

    @torch.no_grad()
    def _teacher_maps(self, batch: dict[str, Tensor]) -> Any:
        with _maps_kept(self.teacher, True):
            return backbone(self.teacher, batch, output_attentions=True).attentions

    def _attention(self, batch: dict[str, Tensor], real: Tensor, maps: Any) -> Tensor:
        """Mean KL between attention rows of real tokens, over heads and mapped layers."""
        above, total = self._teacher_maps(batch), maps[0].new_zeros((), dtype=torch.float32)
        rows = real[:, None, :].expand(maps[0].shape[:3])
        count = rows.sum().float()
        team().average([count])  # a mean over the rows of all processes
        for teacher, student in self.pairs:
            target, own = above[teacher - 1].float()[rows], maps[student - 1].float()[rows]
            log_ratio = (target.clamp(min=1e-9) / own.clamp(min=1e-9)).log()
            total = total + (target * log_ratio).sum() / count
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
