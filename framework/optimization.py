"""The optimiser of the trained parameters and the schedules of numbers that change with the step."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framework.interfaces import Schedule


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
        if self.learning_rate <= 0:
            raise ValueError(f"AdamW.learning_rate must be positive, got {self.learning_rate}")
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

    def step(self, optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], update: int) -> dict[str, Tensor]:
        """Clip, step, clear. Raises FloatingPointError for a non-finite gradient before any parameter moves."""
        # the norm before any clipping: a NaN norm would spread to all gradients and hide where it came from
        norm = nn.utils.get_total_norm([p.grad for p in named.values() if p.grad is not None])
        if not bool(torch.isfinite(norm)):  # one read per optimiser step; the norm is logged anyway
            bad = next((n for n, p in named.items() if p.grad is not None and not p.grad.isfinite().all()), "the norm")
            raise FloatingPointError(
                f"non-finite gradient in {bad} at update {update}; lower AdamW.learning_rate={self.learning_rate}"
            )
        nn.utils.clip_grads_with_norm_(named.values(), self.max_grad_norm, norm)
        rate = self.learning_rate * min(1.0, (update + 1) / max(1, self.lr_warmup_steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "lr": torch.tensor(rate)}
