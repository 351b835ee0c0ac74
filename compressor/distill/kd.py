"""Knowledge distillation on logits (Hinton et al., arXiv 1503.02531).

    L = (1 - c) T^2 D(softmax(z_t / T), softmax(z_s / T)) + c CE

with D the forward KL by default, T = 1 and c = 0: what Minitron found best for pruned models
(arXiv 2407.14679). logits.py says what is computed, and on which positions.
"""

from pydantic import Field
from torch import nn

from compressor.distill.logits import LogitsLoss, LogitsOptions, refuse_unlike
from compressor.model.model import Model
from compressor.options import options


@options
class Options(LogitsOptions):
    """Distillation on logits."""

    ce: float = Field(0.0, ge=0, lt=1, description="share of plain cross entropy")


def objective(options: Options, student: Model, teacher: Model | None) -> nn.Module:
    """Divergence between the teacher's and the student's predictions.

    Raises:
        CompressError: the models predict nothing, or different vocabularies, or the options
            exclude each other.
    """
    assert teacher is not None
    source = (options.top_k, options.correct_teacher)
    refuse_unlike("distill.kd", student, teacher, options.kind, *source)
    share = (1 - options.ce, options.ce)
    return LogitsLoss(student, teacher, options.kind, options.temperature, *share, *source)
