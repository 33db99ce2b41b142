"""All that decides the result, beside the parents."""

from __future__ import annotations

import math
from dataclasses import dataclass

from secateur.errors import SecateurError
from secateur.files.limits import MAX_EXPERTS

DIVISIONS = ("order", "kmeans", "coactivation")
KV = ("experts", "shared")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `upcycle` was asked for; see there."""

    form: str
    target: str | None = None
    experts: int | None = None
    top_k: int | None = None
    granularity: int = 1
    attention_from: int | None = None
    kv: str = "experts"
    attention_top_k: int | None = None
    renormalise: bool | None = None
    noise: float = 0.0
    division: str = "order"
    shared_neurons: int = 0
    router: str | None = None
    router_std: float = 0.02
    router_data: tuple[str, ...] = ()
    samples: int = 16
    sequence_length: int = 256
    seed: int = 0
    allow_unrelated: bool = False

    def check(self) -> None:
        """
        Raises:
            SecateurError: a number out of its range; names the option.
        """
        least = {
            "experts": 1,
            "top_k": 1,
            "attention_top_k": 1,
            "granularity": 1,
            "shared_neurons": 0,
            "samples": 1,
            "sequence_length": 2,
        }
        for name, value in least.items():
            found = getattr(self, name)
            if found is not None and found < value:
                raise SecateurError(f"--{name.replace('_', '-')} {found}: expected at least {value}")
        for name in ("experts", "granularity", "top_k"):
            if (found := getattr(self, name)) is not None and found > MAX_EXPERTS:
                raise SecateurError(f"--{name.replace('_', '-')} {found}: expected at most {MAX_EXPERTS}")
        if (self.experts or 1) * self.granularity > MAX_EXPERTS:
            raise SecateurError(
                f"--experts {self.experts}: --granularity {self.granularity} makes more than {MAX_EXPERTS} experts"
            )
        for name in ("noise", "router_std"):
            found = getattr(self, name)
            if not (found >= 0 and math.isfinite(found)):
                raise SecateurError(f"--{name.replace('_', '-')} {found}: expected a number of at least 0")
        for name, known in {"division": DIVISIONS, "kv": KV}.items():
            if getattr(self, name) not in known:
                raise SecateurError(f"--{name} {getattr(self, name):.40}: expected {', '.join(known)}")
