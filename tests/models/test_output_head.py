"""The head taken from a model gives the model's own logits, whatever its form."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from kedge.errors import UserError
from kedge.head import score
from kedge.models import build_model, head_of, hidden_states, verify_head

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "initializer_range": 0.3,
}


def odd_heads():
    yield CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))
    yield GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0))
    yield HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**SIZES, logits_scaling=4.0))
    yield PhiForCausalLM(PhiConfig(**SIZES))


@pytest.fixture(params=range(4), ids=["cohere", "granite", "hyperclovax", "phi"])
def odd_model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = list(odd_heads())[request.param].double().eval()
        if model.lm_head.bias is not None:
            torch.nn.init.normal_(model.lm_head.bias)
    return model


def test_scales_and_biases_of_other_architectures(odd_model):
    tokens, lengths = torch.arange(12), torch.tensor([5, 7])
    with torch.no_grad():
        ours = score(
            hidden_states(odd_model, tokens, lengths),
            head_of(odd_model),
            tokens,
            want={"log_prob", "log_normalizer"},
        )
        logits = torch.cat([odd_model(input_ids=row[None]).logits[0] for row in tokens.split([5, 7])])
    torch.testing.assert_close(ours["log_normalizer"], logits.logsumexp(-1), atol=1e-10, rtol=0)
    expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(ours["log_prob"], expected, atol=1e-10, rtol=0)
    verify_head(odd_model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_verification_accepts_every_known_architecture_in_every_dtype(make, architecture, dtype):
    verify_head(make(architecture, dtype))


class DoubledLogits(LlamaForCausalLM):
    """A head of a form that nobody announced."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_verification_names_an_architecture_with_an_unknown_head(make, dtype):
    model = DoubledLogits(make("llama").config).to(dtype)
    with pytest.raises(UserError, match=r"DoubledLogits \(llama\)"):
        verify_head(model)


def test_verification_is_not_disturbed_by_training_mode(make):
    model = make("gpt2").train()
    verify_head(model)
    assert all(module.training for module in model.modules())


def test_padding_rows_of_the_vocabulary_take_no_part(make):
    model = make("llama", torch.float64)
    tokens, lengths = torch.arange(8), torch.tensor([8])
    with torch.no_grad():
        value = score(
            hidden_states(model, tokens, lengths), head_of(model, vocabulary=60), tokens, want={"log_prob"}
        )["log_prob"]
        logits = model(input_ids=tokens[None]).logits[0, :, :60]
    expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("vocabulary", [0, 68])
def test_a_vocabulary_beyond_the_head_is_refused(make, vocabulary):
    with pytest.raises(UserError, match=f"vocabulary = {vocabulary}.*67 rows"):
        head_of(make("llama"), vocabulary=vocabulary)


def test_a_model_without_an_output_head_is_refused(make):
    with pytest.raises(UserError, match="LlamaModel has no output head"):
        head_of(make("llama").model)


def test_gradients_reach_a_tied_weight_through_both_of_its_uses(make):
    tokens, lengths = torch.arange(1, 9), torch.tensor([8])
    model = make("llama", torch.float64)
    targets = tokens.roll(-1)
    score(hidden_states(model, tokens, lengths), head_of(model), targets, want={"log_prob"})[
        "log_prob"
    ].sum().backward()
    ours = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    model(input_ids=tokens[None]).logits[0].log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    torch.testing.assert_close(ours, model.get_input_embeddings().weight.grad, atol=1e-9, rtol=0)


def test_an_untied_head_is_its_own_weight():
    model = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0, tie=False)
    assert head_of(model).weight is model.lm_head.weight
    assert head_of(model).weight is not model.get_input_embeddings().weight


def test_a_quantised_head_is_refused() -> None:
    model = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0, tie=False)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(32, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"output head of LlamaForCausalLM is quantised \(torch.int8\)"):
        head_of(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(value: float) -> None:
    model = build_model(40, hidden_size=16, layers=2, heads=2, context=32, seed=0)
    model.config.name_or_path = "runs/diverged"
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = value
    with pytest.raises(
        UserError, match=r"'runs/diverged': model.layers.1.mlp.up_proj.weight holds NaN or infinity"
    ):
        verify_head(model)


def test_logits_that_overflow_are_said() -> None:
    model = build_model(40, hidden_size=16, layers=1, heads=2, context=32, seed=0, tie=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0).add_(3e38)
        model.model.norm.weight.mul_(100)
    with pytest.raises(UserError, match=r"its logits in torch.float32 are not: use a wider dtype"):
        verify_head(model)
