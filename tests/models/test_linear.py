from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kedge.head.products import onednn
from kedge.models import (
    build_model,
    disable_dropout,
    enable_activation_checkpointing,
    fast_linears,
    hidden_states,
)
from kedge.models import linear as module

needs_onednn = pytest.mark.skipif(onednn() is None, reason="PyTorch's own choice is taken on this processor")


def gradients(layer: nn.Linear, inputs: Tensor, pull: Tensor) -> list[Tensor]:
    inputs = inputs.detach().requires_grad_()
    parameters = [each for each in layer.parameters() if each.requires_grad]
    outputs = layer(inputs)
    return [outputs.detach(), *torch.autograd.grad(outputs, [inputs, *parameters], pull)]


@needs_onednn
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(700,), (7, 100), (100, 7)])
def test_values_and_gradients_are_those_of_a_linear_layer(
    shape: tuple[int, ...], bias: bool, frozen: bool
) -> None:
    torch.manual_seed(0)
    layer, inputs, pull = nn.Linear(80, 96, bias=bias), torch.randn(*shape, 80), torch.randn(*shape, 96)
    layer.weight.requires_grad_(not frozen)
    if shape == (100, 7):  # strides of a transposed batch
        inputs, pull = inputs.transpose(0, 1), pull.transpose(0, 1)
    with fast_linears(layer, 700):
        found = gradients(layer, inputs, pull)
    expected = gradients(layer.double(), inputs.double(), pull.double())
    assert any(not torch.equal(one, other.float()) for one, other in zip(found, expected, strict=True))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-5 * float(other.abs().max()))


@needs_onednn
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_model_has_the_gradients_that_it_has(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(64, architecture=architecture, hidden_size=64, layers=2, heads=2, context=256, seed=0)
    tokens, lengths = torch.arange(600) % 64, torch.tensor([200, 250, 150])
    found = {}
    for fast in (True, False):
        with monkeypatch.context() as patch:
            if not fast:
                patch.setattr(module, "onednn", lambda: None)
            hidden_states(model, tokens, lengths).square().sum().backward()
        found[fast] = [each.grad for each in model.get_decoder().parameters()]
        model.zero_grad(set_to_none=True)
    pairs = list(zip(found[True], found[False], strict=True))
    assert any(not torch.equal(one, other) for one, other in pairs)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


def taken(layer: nn.Module, inputs: Tensor) -> bool:
    """Whether a pass goes the fast way, as its backward shows."""
    seen, ahead = set(), [layer(inputs).grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None:
            seen.add(type(node).__name__)
            ahead += [following for following, _ in node.next_functions]
    return "_LinearBackward" in seen


@needs_onednn
def test_activations_that_are_computed_again_or_kept_elsewhere_are_left_to_pytorch() -> None:
    """Backward comes after the block, where the same layers are PyTorch's: both must keep the same tensors."""
    layer, inputs = nn.Linear(256, 256), torch.randn(256, 256, requires_grad=True)
    with fast_linears(layer, 256):
        assert taken(layer, inputs)
        with torch.autograd.graph.save_on_cpu():
            assert not taken(layer, inputs)
        again = checkpoint(layer, inputs, use_reentrant=False)
    again.sum().backward()
    torch.testing.assert_close(inputs.grad, layer.weight.sum(0).expand(256, 256), rtol=1e-4, atol=1e-4)
    model = build_model(64, hidden_size=64, layers=2, heads=2, context=256, seed=0)
    enable_activation_checkpointing(disable_dropout(model))
    hidden_states(model, torch.arange(600) % 64, torch.tensor([200, 250, 150])).sum().backward()


@needs_onednn
@pytest.mark.parametrize("frozen", ["weight", "inputs"])
def test_nothing_is_kept_that_backward_does_not_need(frozen: str) -> None:
    layer, inputs = nn.Linear(256, 256), torch.randn(256, 256, requires_grad=frozen != "inputs")
    layer.weight.requires_grad_(frozen != "weight")
    with fast_linears(layer, 256):
        saved_inputs, saved_weight = layer(inputs).grad_fn.saved_tensors
    assert (saved_inputs is None) == (frozen == "weight")
    assert (saved_weight is None) == (frozen == "inputs")


@needs_onednn
def test_the_switch_is_for_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = nn.Linear(256, 256), torch.randn(256, 256)
    with fast_linears(layer, 256):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        assert not taken(layer, inputs)
    with fast_linears(layer, 256):
        assert "forward" not in vars(layer)


def test_layers_elsewhere_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn", lambda: pytest.fail("is asked for nothing"))
    others = nn.Linear(256, 256, device="meta"), nn.Linear(256, 256, dtype=torch.float64), nn.Linear(2, 2)
    compiled = nn.Linear(256, 256)
    compiled.compile(backend="eager")
    model = nn.Sequential(*others, compiled)
    with fast_linears(model, 256):
        assert not any("forward" in vars(each) for each in model)


@needs_onednn
def test_what_is_not_a_plain_layer_is_left_alone() -> None:
    class Other(nn.Linear):
        pass

    hooked = nn.Linear(2, 2)
    hooked.forward = lambda inputs: inputs  # type: ignore[method-assign]
    model = nn.Sequential(Other(2, 2), hooked, nn.Linear(2, 2))
    with fast_linears(model, 10**7), fast_linears(model, 10**7):
        assert ["forward" in vars(each) for each in model] == [False, True, True]
    assert ["forward" in vars(each) for each in model] == [False, True, False]


def test_nothing_changes_where_pytorchs_choice_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn", lambda: None)
    layer = nn.Linear(256, 256)
    with fast_linears(layer, 10**7):
        assert "forward" not in vars(layer)


def test_autocast_is_followed() -> None:
    layer, inputs = nn.Linear(256, 256), torch.randn(256, 256)
    with fast_linears(layer, 256), torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16


@needs_onednn
def test_functions_of_torch_func_go_through() -> None:
    layer, inputs = nn.Linear(256, 256), torch.randn(2, 256, 256)
    expected = torch.func.vmap(layer)(inputs)
    with fast_linears(layer, 512):
        assert torch.equal(torch.func.vmap(layer)(inputs), expected)
        assert not torch.equal(layer(inputs), expected)  # the other library's rounding


def test_inputs_that_do_not_fit_are_told_by_pytorch() -> None:
    layer = nn.Linear(256, 256)
    with fast_linears(layer, 512), pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(torch.randn(512, 128))


@needs_onednn
def test_layers_too_small_for_it_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(800, 800))
    with fast_linears(model, 10):
        assert ["forward" in vars(each) for each in model] == [False, True]
