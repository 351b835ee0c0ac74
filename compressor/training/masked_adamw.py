"""AdamW that pulls masked-out weights towards zero (SR-STE, arXiv 2102.04010; 2407.20584).

    lambda_t = decay * min(1, t / ramp)                     t finished steps; ramp 0: constant
    p_t = lambda_t (not m) * W                              the pull, on masked-out weights only

denominator (Adaptive Sparse Trainer, GPT-2): the pull leaves no trace in the momentum
    m1 <- b1 m1 + (1 - b1) g        u = m1 + p_t        v <- b2 v + (1 - b2) u^2
gradient (classic SR-STE; Adaptive Sparse Trainer, LLaMA): it is part of the gradient
    g <- g + p_t    m1 <- b1 m1 + (1 - b1) g    u = m1    v <- b2 v + (1 - b2) g^2

    W <- W - lr / (1 - b1^t) * u / (sqrt(v / (1 - b2^t)) + eps)          t now counts this step

before which decoupled weight decay, W <- (1 - lr wd) W, is done. A parameter without a mask gets
plain AdamW. Gradients are clipped by the loop, so the pull is not.

In the denominator form v averages m1^2 where AdamW averages g^2. m1 is smoother than g, so steps
of a masked matrix are larger than AdamW's at the same rate: by 1 / (1 - b1) in the first step and
by about sqrt((1 + b1) / (1 - b1)), 4.4 at b1 = 0.9, where gradients are mostly noise.

The GPT-2 optimizer that was released takes the bitwise complement of an integer mask, so its
"pull" has the wrong sign and falls on kept weights too. This is the paper's formula.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.training.straight_through import Masked

DecayForm = Literal["denominator", "gradient"]


class MaskedAdamW(Optimizer):
    """AdamW with a decay of masked-out weights.

    Its state_dict holds tensors and numbers only; the masks are not in it.

    Args:
        groups: as for any torch optimizer; each has its lr and weight_decay.
        masks: of the parameters that have one.
        betas: (b1, b2).
        decay: lambda at the end of the ramp.
        ramp: steps until then; 0 for a constant lambda.
        form: where the pull enters.
        eps: of the denominator.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        masks: Mapping[nn.Parameter, Masked],
        betas: tuple[float, float],
        decay: float,
        ramp: float,
        form: DecayForm,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "betas": betas, "eps": eps}
        super().__init__(groups, defaults)
        self.masks, self.decay, self.ramp, self.form = masks, decay, ramp, form

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, w: nn.Parameter, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[w]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(w), torch.zeros_like(w)
        w.mul_(1 - group["lr"] * group["weight_decay"])
        pull = self._pull(w, int(state["step"]))
        state["step"] += 1
        t, (b1, b2), v = int(state["step"]), group["betas"], state["exp_avg_sq"]
        if pull is not None and self.form == "gradient":
            g = g + pull
        u = state["exp_avg"].lerp_(g, 1 - b1)
        squared = g
        if pull is not None and self.form == "denominator":
            u = squared = u + pull
        v.mul_(b2).addcmul_(squared, squared, value=1 - b2)
        denominator = (v.sqrt() / math.sqrt(1 - b2**t)).add_(group["eps"])
        w.addcdiv_(u, denominator, value=-group["lr"] / (1 - b1**t))

    def _pull(self, w: nn.Parameter, t: int) -> Tensor | None:
        """lambda_t (not m) * W; None for a parameter without a mask."""
        if w not in self.masks:
            return None
        share = min(1.0, t / self.ramp) if self.ramp > 0 else 1.0
        return torch.where(self.masks[w].mask_OI, 0.0, w * (self.decay * share))
