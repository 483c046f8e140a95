"""The optimiser of the trained parameters and the schedules of numbers that change with the step."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framework.distributed import held, whole
from framework.interfaces import Schedule
from framework.nonfinite import NonFinite


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step."""

    value: float = 0.0

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Ramp(Schedule):
    """0 before ``start``, then rate · (step − start), never above ``cap``.

    The behaviour policy's decay of DiffusionNFT: type 1 is Ramp(.001, .5), type 2 Ramp(.0075, .999, start=75).
    """

    rate: float = 0.001
    cap: float = 0.5
    start: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate < math.inf or not 0 <= self.cap <= 1:
            raise ValueError(
                f"Ramp.rate must be 0 or more and finite, cap lie in [0, 1], got {self.rate} and {self.cap}"
            )

    def __call__(self, step: int) -> float:
        return min(max(0.0, self.rate * (step - self.start)), self.cap)


@dataclass(frozen=True)
class AdamW:
    """AdamW with linear warm-up to a constant rate and gradient clipping.

    max_grad_norm: clip the global norm. lr_warmup_steps: step s runs at rate · min(1, (s + 1) / lr_warmup_steps), so
    the first step already moves. A non-finite gradient stops the run: it names the step and the first parameter.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    lr_warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"AdamW.learning_rate must be positive and finite, got {self.learning_rate}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"AdamW.beta1 and beta2 must lie in [0, 1), got {self.beta1} and {self.beta2}")
        if not (0 < self.eps < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"AdamW.eps must be positive, weight_decay 0 or more, both finite; got {self.eps} and "
                f"{self.weight_decay}"
            )
        if self.lr_warmup_steps < 0:
            raise ValueError(f"AdamW.lr_warmup_steps must be 0 or more, got {self.lr_warmup_steps}")
        if self.max_grad_norm <= 0:
            raise ValueError(f"AdamW.max_grad_norm must be positive, got {self.max_grad_norm}; inf never clips")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            parameters,
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            foreach=True,
        )

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        named: dict[str, nn.Parameter],
        update: int,
        terms: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Clip, step, clear. Raises NonFinite for a gradient, or a term of the loss, before any parameter moves."""
        # the norm before any clipping: a NaN norm would spread to all gradients and hide where it came from
        norm = whole(nn.utils.get_total_norm([p.grad for p in named.values() if p.grad is not None]))
        watched = torch.stack([norm, *(value.detach().to(norm) for value in (terms or {}).values())])
        if not bool(torch.isfinite(watched).all()):  # one read per optimiser step
            reached = {name: held(p.grad) for name, p in named.items() if p.grad is not None}
            gradient = next((name for name, grad in reached.items() if not grad.isfinite().all()), None)
            found = [name for name, value in (terms or {}).items() if not bool(torch.isfinite(value))]
            if gradient is not None or not found:
                found.insert(0, f"gradient in {gradient or 'the norm'}")
            raise NonFinite(
                f"non-finite {', '.join(found)} at update {update}; lower AdamW.learning_rate={self.learning_rate}"
            )
        nn.utils.clip_grads_with_norm_(named.values(), self.max_grad_norm, norm)
        rate = self.learning_rate * min(1.0, (update + 1) / max(1, self.lr_warmup_steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "lr": torch.tensor(rate)}
