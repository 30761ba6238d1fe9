"""Variants of LoRA: DoRA, and the initialisations PiSSA and OLoRA; each in PEFT's layout on disk.

Give one of the configurations here to ``apply_lora`` instead of a ``LoRAConfig``. Two further
variants need no code here: rsLoRA is ``LoRAConfig(rank_stabilized=True)``, and LoRA+ is
``TrainingConfig(lora_plus_ratio=16)``, a larger learning rate for B.

Shapes: in and out are the widths of the adapted layer, r its rank.
"""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clinora.kernels import dropout
from clinora.lora import LoRAConfig, LoRALinear, is_autocast, no_autocast


@dataclass(frozen=True, kw_only=True, slots=True)
class DoRAConfig(LoRAConfig):
    """DoRA (Liu et al. 2024, section 4): m ∘ V/‖V‖ with V = W + s·B·A replaces W.

    The norm is that of each row of V, the weights that one output reads; the paper writes columns
    of the transposed weight. The vector m (out) starts as the norms of W's rows and is trained
    beside A and B. Each forward pass also computes B·A (out × in) and the norms.
    """

    variant: ClassVar[str] = "DoRA"

    @property
    def equation(self) -> str:
        # super() alone does not work in a dataclass with slots, which is created twice.
        return f"m ∘ V/‖V‖ with V = {super(DoRAConfig, self).equation}"

    def new_layer(self, linear: nn.Linear) -> "DoRALinear":
        return DoRALinear(linear, self)


class DoRALinear(LoRALinear):
    """A linear layer with a trained magnitude m: y = (m/‖V‖) ∘ (V·x) + b, with V = W + s·B·A.

    Dropout acts on what differs from the base: y = W·x + b + (m/‖V‖ ∘ V − W)·dropout(x).
    """

    trained = (*LoRALinear.trained, "lora_magnitude_vector")

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__(base, config)
        norms = base.weight.detach().to(self.lora_A.dtype).norm(dim=1)  # (out,)
        self.lora_magnitude_vector = nn.Parameter(norms)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in) → (..., out), in the dtype of the base layer's output."""
        y = F.linear(x, self.weight, self.bias)
        if self.strength == 0:
            return y
        if not is_autocast(x.device.type):  # autocast chooses the dtype itself
            x = x.to(self.lora_A.dtype)
        dropped = dropout(x, self.config.dropout, self.training)
        if dropped is not x:
            Wx = F.linear(dropped, self.weight.to(x.dtype))
        elif self.bias is not None:
            Wx = y - self.bias
        else:
            Wx = y
        BAx = F.linear(F.linear(dropped, self.lora_A), self.lora_B * self.config.scaling)
        gain = self.gain(self.weight.to(self.lora_A.dtype))
        update = (gain - 1) * Wx + gain * BAx
        return (y + self.strength * update).to(y.dtype)

    def gain(self, weight: Tensor) -> Tensor:
        """Compute m/‖V‖ (out,) for a weight W (out × in).

        The norm is a constant for the gradient (section 4.3).
        """
        with no_autocast(weight.device.type), torch.no_grad():
            # torch.compile cannot follow super() here.
            norms = LoRALinear.adapted(self, weight).norm(dim=1)
        # A row of zeros, as in a pruned model, has no direction: its output stays zero.
        norms = norms.clamp(min=torch.finfo(norms.dtype).tiny)
        return self.lora_magnitude_vector.to(norms.dtype) / norms

    def adapted(self, weight: Tensor) -> Tensor:
        """Give the weight of the adapted layer, m ∘ V/‖V‖, in the dtype of ``weight``."""
        return self.gain(weight)[:, None] * super().adapted(weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class PiSSAConfig(LoRAConfig):
    """PiSSA (Meng et al. 2024, section 3): A and B start as W's r largest singular triples.

    With W = U·S·Vᵀ, A₀ = √(S/s)·Vᵀ and B₀ = U·√(S/s), of the r largest values S. So s·B₀·A₀ is the
    best approximation of W of rank r. The paper subtracts it from W; here W stays, and the layer
    computes W·x + s·(B·A − B₀·A₀)·x, which is the same function. So ``lora_strength(model, 0)`` is
    the base, and dropout acts on the change alone, while PEFT's also drops out the principal part.
    Saving writes B·A − B₀·A₀ as LoRA of rank 2r, as PEFT's conversion does.
    """

    variant: ClassVar[str] = "PiSSA"

    @property
    def equation(self) -> str:
        factor = "α/√r" if self.rank_stabilized else "α/r"
        return f"W + ({factor})·(B·A − B₀·A₀)"

    def check_layer(self, name: str, linear: nn.Linear) -> None:
        """Check that the decomposition exists, and that an update of rank 2r can be saved.

        Raises:
            ValueError: The rank exceeds half of the smaller side, or a weight is not finite.
        """
        largest = min(linear.weight.shape) // 2
        if self.rank > largest:
            raise ValueError(
                f"rank {self.rank} is too large for {name}: at most {largest}, half of its smaller "
                f"side, because {self.variant} is saved as LoRA of twice the rank"
            )
        if not linear.weight.is_meta and not linear.weight.isfinite().all():
            raise ValueError(f"the weight of {name} has values that are not finite")

    def new_layer(self, linear: nn.Linear) -> "ShiftedLoRALinear":
        return ShiftedLoRALinear(linear, self)

    def first_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Compute A₀ (r × in) and B₀ (out × r) of a weight (out × in)."""
        U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
        root = (S[: self.rank] / self.scaling).sqrt()
        return root[:, None] * Vt[: self.rank], U[:, : self.rank] * root

    def as_lora(self) -> LoRAConfig:
        """The plain LoRA of rank 2r and the same scaling s, which an adapter on disk has."""
        # s = α/r = 2α/2r, and s = α/√r = √2·α/√(2r).
        factor = math.sqrt(2) if self.rank_stabilized else 2
        options = {field.name: getattr(self, field.name) for field in fields(LoRAConfig)}
        options["rank"] = 2 * self.rank
        options["alpha"] = factor * self.alpha
        options["rank_pattern"] = {key: 2 * rank for key, rank in self.rank_pattern.items()}
        options["alpha_pattern"] = {key: factor * a for key, a in self.alpha_pattern.items()}
        return LoRAConfig(**options)


@dataclass(frozen=True, kw_only=True, slots=True)
class OLoRAConfig(PiSSAConfig):
    """OLoRA (Büyükakyüz 2024, section 3): B and A start as r columns of Q and rows of R, W = Q·R.

    All else is as in ``PiSSAConfig``.
    """

    variant: ClassVar[str] = "OLoRA"

    def first_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(weight)
        return R[: self.rank], Q[:, : self.rank]


class ShiftedLoRALinear(LoRALinear):
    """A linear layer whose update starts at zero though B does not: y = W·x + s·(B·A − B₀·A₀)·x."""

    def __init__(self, base: nn.Linear, config: PiSSAConfig) -> None:
        super().__init__(base, config)
        A, B = config.first_factors(base.weight.detach().to(self.lora_A.dtype))
        # Not saved with the model: they follow from W.
        self.register_buffer("first_A", A.contiguous(), persistent=False)
        self.register_buffer("first_B", B.contiguous(), persistent=False)
        with torch.no_grad():
            self.lora_A.copy_(self.first_A)
            self.lora_B.copy_(self.first_B)

    def factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(2r × in) and (out × 2r) factors of B·A − B₀·A₀ = (B − B₀)·A + B₀·(A − A₀).

        Written so, small changes are not lost between large numbers, and none gives zeros.
        """
        first_A = self.first_A.to(A)
        first_B = self.first_B.to(B)
        return torch.cat([A, A - first_A]), torch.cat([B - first_B, first_B], dim=1)


# The names of the configurations on the command line.
VARIANTS = {"lora": LoRAConfig, "dora": DoRAConfig, "pissa": PiSSAConfig, "olora": OLoRAConfig}
