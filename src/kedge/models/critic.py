"""The critic: a value head on hidden states, with or without a backbone of its own."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from kedge.errors import UserError
from kedge.models.load import is_reward_model, load_model, load_reward_model
from kedge.models.scores import reward_model_from


class Critic(nn.Module):
    """What estimates the value of a state from the hidden state that predicts the next token: V = w·h.

    The state s_t is the prompt with the response tokens before t, so its value stands at the same position as
    the token's log-probability (`Rollout.predicting`), and never knows the token.

    Args:
        width: H, of the hidden states.
        backbone: the decoder that makes them; None to read those of the policy.

    Attributes:
        backbone: as given.
        head: w, in float32 at least; it starts at 0, so that nothing is expected at first.

    >>> Critic(8)(torch.ones(3, 8)).tolist()
    [0.0, 0.0, 0.0]
    """

    def __init__(self, width: int, backbone: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.utils.skip_init(nn.Linear, width, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, " N"]:
        """Give the value of each state, in the unit of the rewards, from its hidden state."""
        weight = self.head.weight
        with torch.autocast(weight.device.type, enabled=False):  # values never below float32
            return nn.functional.linear(hidden.to(weight.dtype), weight)[:, 0]


def critic_beside(policy: PreTrainedModel, *, shared: bool) -> Critic:
    """Make a critic that starts from the policy: from a copy of its backbone, or on its own hidden states.

    Args:
        policy: a causal language model; a copy is taken of everything but its output head.
        shared: read the policy's hidden states instead of having a backbone.

    >>> from kedge.models import build_model, hidden_states
    >>> policy = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> critic = critic_beside(policy, shared=False)
    >>> tokens, lengths = torch.tensor([3, 4, 5]), torch.tensor([3])
    >>> torch.equal(hidden_states(critic.backbone, tokens, lengths), hidden_states(policy, tokens, lengths))
    True
    """
    return _critic(policy, None if shared else copy.deepcopy(policy.get_decoder()))


def load_critic(source: str | Path, *, dtype: torch.dtype = torch.float32) -> Critic:
    """Load a critic's backbone; of a reward model also the score, as the first value of every state.

    Args:
        source: a causal language model, or a sequence-classification model with one label (a reward model):
            folder or name on the hub.
        dtype: of the backbone's weights in memory.

    Raises:
        UserError: as :func:`load_model` and :func:`load_reward_model`; a score that is more than a linear layer.
        RunError: damaged files; the hub cannot be reached.

    >>> from tempfile import TemporaryDirectory
    >>> from kedge.models import build_model, save_model
    >>> with TemporaryDirectory() as folder:
    ...     save_model(build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0), None, folder)
    ...     load_critic(folder).head.weight.shape
    torch.Size([1, 8])
    """
    if not is_reward_model(source):
        model = load_model(source, dtype=dtype)
        return _critic(model, model.get_decoder())
    model = load_reward_model(source, dtype=dtype)
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or "bias" in dict(score.named_parameters()):
        raise UserError(
            f"critic {str(source)!r}: the score of {type(model).__name__} is not one linear layer without bias on "
            "the hidden state, which a value head is: start from a causal language model instead"
        )
    critic = _critic(model, model.get_decoder())
    with torch.no_grad():
        critic.head.weight.copy_(score.weight)
    return critic


def reward_model_of(critic: Critic, *, pad_id: int | None, end_ids: tuple[int, ...] = ()) -> PreTrainedModel:
    """Give a critic as a sequence classifier, whose score of a text is the value of the state after it.

    Saved, it loads with :func:`load_critic`, and with ``AutoModelForSequenceClassification``.

    Args:
        critic: one with a backbone of its own; copied.
        pad_id: see :func:`reward_model_from`.
        end_ids: see :func:`reward_model_from`.

    Raises:
        UserError: the architecture has no sequence classifier.
    """
    assert critic.backbone is not None
    model = reward_model_from(critic.backbone, seed=0, pad_id=pad_id, end_ids=end_ids)
    model.score.to(critic.head.weight.dtype).load_state_dict(critic.head.state_dict())
    return model


def _critic(model: PreTrainedModel, backbone: PreTrainedModel | None) -> Critic:
    weight = model.get_input_embeddings().weight
    width = int(model.config.get_text_config(decoder=True).hidden_size)
    dtype = torch.promote_types(model.dtype, torch.float32)
    critic = Critic(width, backbone).to(device=weight.device)
    critic.head.to(dtype)
    return critic.requires_grad_(True).eval()
