"""Seeds by name: every random draw of a stage has its own, so that nothing random needs to be saved.

Stages of one run draw alike: those that start from the same policy are compared on the same prompts in the same order.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *labels: str | int) -> int:
    """Give a 63-bit seed that depends on the run's seed and on what it is for.

    >>> derive_seed(0, "rollout", 3) == derive_seed(0, "rollout", 3)
    True
    >>> derive_seed(0, "rollout", 3) == derive_seed(0, "rollout", 4)
    False
    """
    text = "/".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *labels: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """Give a fresh generator with the seed of ``derive_seed``."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *labels))
