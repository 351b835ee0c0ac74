"""A vision transformer becomes a quantized spike-driven one (QSD, arXiv 2501.13492).

    y = (W_q l) / D + b,   l = floor(clip(D u, 0, D) + 1/2)         u the membrane potential
    W_q = a round(clamp(W / a, -2^(b-1), 2^(b-1) - 1))              a: LSQ, one step an output
    L = c CE(z_s) + w T^2 KL(z_a || z_s) + r sum_l sum_qkv ||G(X_s) - G(X_a)||_F

Two levels. Plain spiking neurons fire or not, so of the potential of a quantized q, k or v hardly
half a bit survives (the paper's "spike information distortion"). The lower level changes how a
potential becomes spikes: IE-LIF neurons have D levels while they train, which pass on up to
log2(D + 1) bits, and serve as D binary steps (numerics/spikes.py). The upper level changes the
potentials: fine-grained distillation (FGD, distill/relations.py) draws the relations of tokens in
q, k and v, and the logits, towards the float network's. Both are minimized at once, by the one
training loop; nothing alternates.

The float network is a ViT, converted weight by weight (model/qsd_convert.py), or a spike-driven
transformer whose neurons do not round (levels: null), of either backbone. Every weight matrix is
quantized, first layer and head included; biases, positions and norms stay float. Afterwards norms
are folded into neurons. Cross entropy needs labelled images; ce: 0 does without.

Where we differ. FGD is reconstructed: its code is not public. A batch norm stands in front of every
neuron, also behind attention, where the paper halves a threshold; it replaces LayerNorm, which has
no spiking form. Pixels lie on a grid of 8 bits, so that every sum of the network is one of integers
and torch and ONNX Runtime agree. Steps are float16, in training as in the file.
"""

from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compressor.distill import runner
from compressor.distill.logits import refuse_unlike
from compressor.distill.predictions import checked_labels
from compressor.distill.relations import outputs_kept, relation_loss, relation_modules
from compressor.errors import CompressError
from compressor.model.forward import accepted
from compressor.model.manifest import WeightFormat
from compressor.model.model import Model
from compressor.model.qsd_convert import fold, make_spiking, settle
from compressor.model.qsd_cost import FORMULA, MAC_PJ, spike_cost, vit_products
from compressor.model.qsd_layers import edges
from compressor.numerics.projection import LearnedGrid, Projection
from compressor.options import options
from compressor.quantize.targets import quantizable
from compressor.quantize.trained import place_all, stepping, users
from compressor.quantize.weights import Target, weight_of
from compressor.training.losses import divergence, label_loss
from compressor.training.options import Train, defaulting
from compressor.training.projected import Projected
from compressor.training.workbench import Workbench

FAMILIES = ("vit", "qsd_transformer")
_SETTLING = 16  # batches that give norms their first statistics
_COUNTED = 8  # batches of validation images on which spikes are counted


@options
class Options:
    """A quantized spike-driven transformer."""

    bits: int = Field(4, ge=2, le=8, description="bits per weight; ONNX Runtime serves 8, 4 and 2")
    levels: int = Field(
        4, ge=1, le=16, description="D: binary spikes of a neuron in a time step; 1 is plain LIF"
    )
    time_steps: int = Field(1, ge=1, le=16, description="T: how often an image is shown")
    ce: float = Field(1.0, ge=0, description="weight of cross entropy with the labels")
    logits: float = Field(1.0, ge=0, description="weight of KL to the teacher's classes")
    relations: float = Field(
        0.1,
        ge=0,
        description="weight of FGD: q-q, k-k and v-v relations of every layer (reconstructed)",
    )
    temperature: float = Field(2.0, gt=0, le=100, description="softens both distributions")
    unrolled: bool = Field(
        False,
        description="serve with T x D binary spikes instead of integers: the same answers, D "
        "times the work on a processor that has no use for spikes",
    )
    step_lr: float = Field(
        1e-3, gt=0, le=1, description="highest rate of learned steps, in mean steps of the layer"
    )
    train: Annotated[Train, defaulting(lr=2e-3)] = Field(
        Train(lr=2e-3), description="how long and how fast; train.lr is 2e-3 unless named"
    )

    @property
    def freeze_embeddings(self) -> bool:
        """Never: a class token and positions are no tables."""
        return False

    @model_validator(mode="after")
    def _learns_something(self) -> "Options":
        if not (self.ce or self.logits or self.relations):
            raise ValueError("ce, logits and relations are all 0")
        return self


def objective(options: Options, student: Model, teacher: Model | None) -> nn.Module:
    """The loss of a student that is quantized elsewhere; looks at names and shapes only.

    Raises:
        CompressError: no vision transformer with a classifier, or a teacher that does not match.
    """
    assert teacher is not None
    _refuse_others(student)
    refuse_unlike("quantize.qsd", student, teacher, "forward", None, None)
    if options.relations:
        _refuse_other_depth(student, teacher)
    return _Loss(options, student, teacher)


def _refuse_others(model: Model) -> None:
    kind = model.family.model_type
    if kind not in FAMILIES or model.task != "image-classification":
        raise CompressError(
            f"quantize.qsd makes spiking networks of vision transformers with a classifier, and "
            f"this is a {kind} model for {model.task}",
            f"take a {' or '.join(FAMILIES)} for image-classification; quantize.distilled trains "
            "other models quantized",
        )
    if getattr(model.config, "folded", False):
        raise CompressError(
            "the norms of this spiking network are folded, so it can be trained no more",
            "start from the vision transformer or the float network that it was made from",
        )
    sparse = [name for name, form in model.formats.items() if form.pattern is not None]
    if sparse:
        raise CompressError(
            f"'{sparse[0]}' has zeros of an earlier stage, and spiking layers promise none",
            "leave out the stage that prunes, or take quantize.distilled",
        )


def _refuse_other_depth(student: Model, teacher: Model) -> None:
    if teacher.family.model_type not in FAMILIES:
        raise CompressError(
            f"the teacher is a {teacher.family.model_type}, whose q, k and v cannot be compared",
            f"take a {' or '.join(FAMILIES)} as teacher, or relations: 0",
        )
    shapes = [_shape(model.config) for model in (student, teacher)]
    for key, own in shapes[0].items():
        if own != shapes[1][key]:
            raise CompressError(
                f"the teacher has {key} {shapes[1][key]} and the student {own}: relations of q, k "
                "and v need the same layers and tokens",
                "take a teacher of the same shape, e.g. the stage before, teacher: stage:N, or "
                "relations: 0",
            )


def _shape(config: Any) -> dict[str, Any]:
    """What decides the layers and tokens whose relations are compared."""
    image, patch = (a if a == b else (a, b) for a, b in edges(config))
    backbone = getattr(config, "backbone", "vit")
    layers = config.num_hidden_layers
    return {
        "num_hidden_layers": layers,
        "image_size": image,
        "patch_size": patch,
        "backbone": backbone,
    }


class _Loss(nn.Module):
    """Cross entropy, KL and relations of one batch.

    Attributes:
        parts: means of the last batch.
    """

    def __init__(self, options: Options, student: Model, teacher: Model) -> None:
        super().__init__()
        self.options, self.student, self.teacher = options, student, teacher
        self.divergence = divergence("forward", options.temperature)
        self.parts: dict[str, Tensor] = {}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        with outputs_kept(self._related(self.student)) as own:
            logits = self.student.module(**accepted(self.student, batch)).logits
        weights, terms = self.options, {}
        if weights.ce:
            labels = checked_labels(self.student, batch.get("labels"))
            terms["ce"] = weights.ce, label_loss(logits, labels).mean()
        if weights.logits or weights.relations:
            with torch.no_grad(), outputs_kept(self._related(self.teacher)) as above:
                wanted = self.teacher.module(**accepted(self.teacher, batch)).logits
            if weights.logits:
                terms["logits"] = weights.logits, self.divergence(logits, wanted).mean()
            if weights.relations:
                terms["relations"] = weights.relations, relation_loss(own, above, len(logits))
        self.parts = {name: value.detach() for name, (_, value) in terms.items()}
        return torch.stack([weight * value for weight, value in terms.values()]).sum()

    def _related(self, model: Model) -> list[nn.Module]:
        return relation_modules(model) if self.options.relations else []


def run(model: Model, options: Options, work: Workbench) -> None:
    """Convert, train and quantize `model`; notes get losses, spikes and energy.

    Raises:
        CompressError: see objective; or the loss is not finite.
    """
    objective(options, model, work.teacher)
    before = model.config
    make_spiking(model, options.time_steps, options.levels, options.unrolled)
    model.module.to(work.device)
    train = options.train
    settle(model, work.batches("train", _SETTLING, batch=train.batch, length=train.length))
    untrained = _counted(model, train, work)
    layers: list[tuple[Target, Projection]] = [
        (t, LearnedGrid(weight_of(model, t.name), t.bits, None)) for t in targets(model, options)
    ]
    loss = _Loss(options, model, work.teacher)
    projected = Projected(loss, [(users(model, target), grid) for target, grid in layers])
    optimizer = stepping(model, projected, train, options.step_lr)
    runner.run(model, projected, options, work, optimizer)
    fold(model)
    place_all(model, layers)
    model.notes["spikes"] = spikes = _counted(model, train, work)
    products = vit_products(before) if before.model_type == "vit" else spikes["float_mac"]
    spikes["float_energy_nj"] = MAC_PJ * products / 1000
    spikes["untrained"] = {
        name: untrained[name] for name in ("firing_rate", "energy_nj", "entropy")
    }
    work.log(
        f"{FORMULA}: {spikes['energy_nj']:.0f} nJ an image with {spikes['mac']:.0f} MAC and "
        f"{spikes['ac']:.0f} AC; {spikes['float_energy_nj']:.0f} nJ in float"
    )


def targets(model: Model, options: Options) -> list[Target]:
    """Every weight matrix of a spike-driven transformer."""
    return [Target(tuple(names), options.bits, None) for names in quantizable(model, True, True)]


def formats(model: Model, options: Options) -> dict[str, WeightFormat]:
    """What weights will be stored as, by the names of the model that is converted."""
    return {
        name: WeightFormat(bits=options.bits)
        for names in quantizable(model, True, True)
        for name in names
    }


def _counted(model: Model, train: Train, work: Workbench) -> dict[str, Any]:
    found = work.batches("validation", _COUNTED, batch=train.batch, length=train.length)
    if not found:
        found = work.batches("train", _COUNTED, batch=train.batch, length=train.length)
    return spike_cost(model, found)
