"""Everything that knows an architecture: from a causal language model to hidden states and an output head."""

from kedge.models.align import to_the_end
from kedge.models.bpe import train_bpe
from kedge.models.build import build_model
from kedge.models.critic import Critic, critic_beside, load_critic, reward_model_of
from kedge.models.device import DTYPES, device_named
from kedge.models.hidden import hidden_states
from kedge.models.identity import fingerprint, frozen_copy
from kedge.models.linear import fast_linears
from kedge.models.load import has_tokenizer, load_like, load_model, load_reward_model, load_tokenizer
from kedge.models.memory import beside_attention
from kedge.models.mode import (
    disable_activation_checkpointing,
    disable_dropout,
    enable_activation_checkpointing,
    evaluating,
)
from kedge.models.output_head import head_of, verify_head
from kedge.models.save import save_model
from kedge.models.scores import reward_model_from, sequence_scores, verify_scores
from kedge.models.shared_prompts import response_states, shares_prompts
from kedge.models.tokens import (
    context_length,
    require_embeddings,
    special_tokens,
    usable_vocabulary,
    vocabulary_difference,
)

__all__ = [
    "DTYPES",
    "Critic",
    "beside_attention",
    "build_model",
    "context_length",
    "critic_beside",
    "device_named",
    "disable_activation_checkpointing",
    "disable_dropout",
    "enable_activation_checkpointing",
    "evaluating",
    "fast_linears",
    "fingerprint",
    "frozen_copy",
    "has_tokenizer",
    "head_of",
    "hidden_states",
    "load_critic",
    "load_like",
    "load_model",
    "load_reward_model",
    "load_tokenizer",
    "require_embeddings",
    "response_states",
    "reward_model_from",
    "reward_model_of",
    "save_model",
    "sequence_scores",
    "shares_prompts",
    "special_tokens",
    "to_the_end",
    "train_bpe",
    "usable_vocabulary",
    "verify_head",
    "verify_scores",
    "vocabulary_difference",
]
