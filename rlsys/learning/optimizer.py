"""AdamW on float32 masters, its learning rate, and the refusal to step on anything non-finite.

Parameters in bfloat16 keep a float32 copy ("master"): gradients are added up and applied in float32, and the
parameters are the master rounded. Small steps are not lost (bfloat16 has 8 bits: lr·update is mostly below
half a unit in the last place), and the learner computes with exactly the bits it publishes.
Float32 parameters are their own masters.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlsys.config.schema import LearnerConfig
from rlsys.errors import CheckpointError
from rlsys.learning.ranks import ALONE, Ranks


def learning_rate(config: LearnerConfig, version: int) -> float:
    """Learning rate of the batch that turns `version` into `version + 1`.

    lr·(v+1)/(warmup+1) for v < warmup; then lr, or linear to zero, which batch `steps` would reach.
    """
    if version < config.warmup_steps:
        return config.lr * (version + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    left = max(config.steps - version, 0)
    return config.lr * left / max(config.steps - config.warmup_steps, 1)


class Optimizer:
    """Accumulate micro-batch gradients with `collect`, then `step` or nothing.

    With several ranks gradients are summed before the norm is taken. Parameters that are divided among them have
    moments and masters divided likewise.
    """

    def __init__(self, model: nn.Module, config: LearnerConfig, ranks: Ranks = ALONE) -> None:
        self._clip = config.grad_clip
        self._ranks = ranks
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for _, p in self._named]
        self._adamw = torch.optim.AdamW(
            self._masters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def collect(self) -> None:
        """Add the gradients of one backward pass to the masters', in float32."""
        for (_, parameter), master in zip(self._named, self._masters, strict=True):
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip to the global norm and step; returns the norm before clipping.

        A norm that is not finite leaves parameters and moments as they are; the gradients are gone either way.
        """
        self._ranks.sum_gradients(self._masters)
        norm = _number(nn.utils.clip_grad_norm_(self._masters, self._clip))
        if math.isfinite(norm):
            self._adamw.param_groups[0]["lr"] = lr
            self._adamw.step()
            self._publish()
        self.discard()
        return norm

    def discard(self) -> None:
        """Forget all gradients."""
        for (_, parameter), master in zip(self._named, self._masters, strict=True):
            parameter.grad = master.grad = None

    def state(self) -> dict[str, Tensor]:
        """Moments, step counts and (below float32) masters, by parameter name; shared with the optimizer."""
        tensors: dict[str, Tensor] = {}
        for (name, parameter), master in zip(self._named, self._masters, strict=True):
            tensors |= {f"{name}/{key}": value for key, value in self._adamw.state.get(master, {}).items()}
            if master is not parameter:
                tensors[f"{name}/master"] = master.detach()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state()`, or from the same gathered. Raises CheckpointError for another model's."""
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, kind = key.rpartition("/")
            moments.setdefault(name, {})[kind] = value
        if foreign := moments.keys() - {name for name, _ in self._named}:
            raise CheckpointError(f"optimizer state names a parameter this model does not have: {min(foreign)}")
        for (name, parameter), master in zip(self._named, self._masters, strict=True):
            mine = moments.get(name, {})
            for kind, value in mine.items():
                if kind != "step" and value.shape != parameter.shape:
                    raise CheckpointError(
                        f"{name}/{kind}: shape {tuple(value.shape)}, expected {tuple(parameter.shape)}"
                    )
            if master is not parameter and "master" in mine:
                master.copy_(self._ranks.share(mine["master"], master))
            self._adamw.state[master] = {
                kind: (value if kind == "step" else self._ranks.share(value, master)).to(master.device, copy=True)
                for kind, value in mine.items()
                if kind != "master"
            }
        self._publish()

    def snapshot(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """A copy to return to with `restore`."""
        return [m.detach().clone() for m in self._masters], {k: v.clone() for k, v in self.state().items()}

    @torch.no_grad()
    def restore(self, snapshot: tuple[list[Tensor], dict[str, Tensor]]) -> None:
        """Undo every step since `snapshot`, bit for bit."""
        masters, state = snapshot
        self.load_state(state)
        for master, value in zip(self._masters, masters, strict=True):
            master.copy_(value)
        self._publish()
        self.discard()

    @torch.no_grad()
    def _publish(self) -> None:
        for (_, parameter), master in zip(self._named, self._masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)


def _number(norm: Tensor) -> float:
    """A norm whose parts may lie with several ranks."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
