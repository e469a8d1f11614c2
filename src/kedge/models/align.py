"""What is cached of prompts, moved to where their responses go on."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def to_the_end(
    filled: Float[Tensor, "B heads T d"], group: Int[Tensor, " R"], lengths: Int[Tensor, " B"]
) -> Float[Tensor, "R heads T d"]:
    """Give each response the keys or values of its prompt, ending in the last column.

    Prompts come in padded on the right. What is left before a prompt are copies of its first column, for a mask to
    hide.

    Args:
        filled: keys or values of the prompts.
        group: the prompt that a response answers.
        lengths: tokens in each prompt.

    Returns:
        A row for each response.

    >>> prompts = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]])[:, None, :, None]
    >>> to_the_end(prompts, torch.tensor([0, 0, 1]), torch.tensor([2, 3]))[:, 0, :, 0].tolist()
    [[1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    width = filled.shape[2]
    columns = torch.arange(width, device=filled.device) - (width - lengths[group])[:, None]
    return filled.transpose(1, 2)[group[:, None], columns.clamp(min=0)].transpose(1, 2)
