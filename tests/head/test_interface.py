"""How the head behaves in a caller's hands: graphs, odd sizes, odd strides, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kedge.head import Anchor, Head, reduce, score

BACKENDS = ["chunked", "dense"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_used_twice_and_another_not_at_all(backend: str, make_case: Callable[..., Any]) -> None:
    case = make_case()
    scores = score(
        case.hidden, case.head, case.targets, anchors=case.anchors, want=case.outputs, backend=backend
    )
    log_prob, kl = scores["log_prob"], scores["reference.reverse_kl"]
    weights = torch.linspace(0, 1, 9, dtype=torch.float64)
    found = torch.autograd.grad(
        (log_prob * kl).sum() + (weights * log_prob).sum(), case.hidden, retain_graph=True
    )[0]
    by_hand = torch.autograd.grad(
        [log_prob, kl], case.hidden, [kl.detach() + weights, log_prob.detach()], retain_graph=True
    )[0]
    torch.testing.assert_close(found, by_hand)
    again = torch.autograd.grad((log_prob * kl).sum() + (weights * log_prob).sum(), case.hidden)[0]
    torch.testing.assert_close(found, again, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str, make_case: Callable[..., Any]) -> None:
    case = make_case(rows=0, bias=True)
    for found in (case.score(backend=backend), case.reduce(backend=backend)):
        scores, gradients = found
        assert {tuple(value.shape) for value in scores.values()} == {(0,)}
        assert all(not gradient.any() for gradient in gradients.values())
        assert gradients["policy.weight"].shape == (11, 4)


@pytest.mark.usefixtures("unchecked")
def test_names_may_come_from_an_iterator(make_case: Callable[..., Any]) -> None:
    case = make_case()
    names = ["log_prob", "entropy"]
    found = score(case.hidden, case.head, case.targets, want=(name for name in names))
    assert list(found) == names


def test_nothing_wanted(make_case: Callable[..., Any]) -> None:
    case = make_case()
    for backend in BACKENDS:
        assert case.score([], backend=backend)[0] == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str, make_case: Callable[..., Any]) -> None:
    case = make_case()
    truth, gradients = case.score(backend=backend)
    hidden = case.hidden.detach().T.contiguous().T.requires_grad_()
    weight = case.head.weight.detach().repeat_interleave(2, dim=1)[:, ::2].requires_grad_()
    targets = case.targets.repeat_interleave(3)[::3]
    assert not any(each.is_contiguous() for each in (hidden, weight, targets))
    scores = score(hidden, Head(weight), targets, anchors=case.anchors, want=case.outputs, backend=backend)
    for name, value in truth.items():
        torch.testing.assert_close(scores[name], value)
    moving = [name for name, value in scores.items() if value.requires_grad]
    found = torch.autograd.grad(
        [scores[n] for n in moving], [hidden, weight], [case.upstream[n] for n in moving]
    )
    torch.testing.assert_close(found, (gradients["policy.hidden"], gradients["policy.weight"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tied_weight_gathers_all_its_gradients(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    tokens, targets = torch.randint(0, 7, (2, 5), generator=generator)

    def loss(embedding: Tensor, head: Tensor) -> Tensor:
        hidden = torch.tanh(embedding[tokens])
        scores = score(
            hidden,
            Head(head),
            targets,
            anchors={"old": (hidden.detach(), Head(head))},  # one head for two sources, too
            want={"log_prob", "old.forward_kl"},
            backend=backend,
        )
        return (scores["log_prob"] + scores["old.forward_kl"]).sum()

    (tied,) = torch.autograd.grad(loss(weight, weight), weight)
    apart = [weight.detach().clone().requires_grad_() for _ in range(2)]
    torch.testing.assert_close(tied, sum(torch.autograd.grad(loss(*apart), apart)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_that_nothing_trained_reaches_have_no_graph(
    backend: str, make_case: Callable[..., Any]
) -> None:
    case = make_case()
    scores, _ = case.score(backend=backend)
    fixed = {name for name, value in scores.items() if not value.requires_grad}
    assert fixed == {"reference.log_prob", "reference.entropy"}
    with torch.no_grad():
        scores, _ = case.score(backend=backend)
    assert not any(value.requires_grad for value in scores.values())


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_top_tokens(backend: str, make_case: Callable[..., Any]) -> None:
    """Ids of both distributions' most probable tokens; the loss beside them keeps its gradients."""
    case = make_case(dtype=torch.float32, bias=True, softcap=2.0, padding=1, masked={"policy": [3]})
    want = ["log_prob", "top_token", "reference.top_token"]
    if backend == "triton":
        pytest.importorskip("triton")
    options = {"backend": backend} if backend == "dense" else {"backend": backend, "chunk_rows": 4}
    scores, gradients = case.score(want, **options)
    for name, (hidden, head) in {
        "": (case.hidden, case.head),
        "reference.": case.anchors["reference"],
    }.items():
        logits = hidden @ head.weight[: head.tokens].T + head.bias[: head.tokens]
        assert scores[f"{name}top_token"].dtype == torch.int64
        assert scores[f"{name}top_token"].tolist() == logits.argmax(-1).tolist()
    alone = case.score(["log_prob"], backend="dense")[1]
    torch.testing.assert_close(gradients, alone)
    assert case.reduce(want, **options)[0]["top_token"].tolist() == scores["top_token"].tolist()


# --- reduce --------------------------------------------------------------------------------------------


def test_reduce_hands_each_chunk_its_rows(make_case: Callable[..., Any]) -> None:
    case = make_case(rows=10)
    seen = []

    def per_token(scores: dict[str, Tensor], rows: slice) -> Tensor:
        seen.append((rows.start, rows.stop, {name: len(value) for name, value in scores.items()}))
        assert scores["log_prob"].requires_grad
        assert not scores["reference.log_prob"].requires_grad
        return (scores["log_prob"] - scores["reference.log_prob"]).sum()

    want = ["log_prob", "reference.log_prob"]
    loss, scores = reduce(
        case.hidden, case.head, case.targets, per_token, anchors=case.anchors, want=want, chunk_rows=4
    )
    assert seen == [
        (start, stop, dict.fromkeys(want, stop - start)) for start, stop in ((0, 4), (4, 8), (8, 10))
    ]
    torch.testing.assert_close(loss, (scores["log_prob"] - scores["reference.log_prob"]).sum())
    assert not any(value.requires_grad for value in scores.values())


def test_reduce_hands_out_its_gradients_once(make_case: Callable[..., Any]) -> None:
    case = make_case()
    loss, _ = reduce(
        case.hidden, case.head, case.targets, lambda s, _: s["log_prob"].sum(), want=["log_prob"]
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call reduce again"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reduce_of_a_loss_that_depends_on_some_chunks_only(
    backend: str, make_case: Callable[..., Any]
) -> None:
    case = make_case()

    def per_token(scores: dict[str, Tensor], rows: slice) -> Tensor:
        if backend == "dense":
            return scores["log_prob"][:4].sum()
        return scores["log_prob"].sum() if rows.start == 0 else torch.zeros(())

    chunks = {"chunk_rows": 4} if backend == "chunked" else {}
    loss, _ = reduce(
        case.hidden, case.head, case.targets, per_token,
        anchors=case.anchors, want=["log_prob", "reference.reverse_kl"], backend=backend, **chunks,
    )  # fmt: skip
    loss.backward()
    assert case.hidden.grad[:4].abs().sum() > 0
    assert not case.hidden.grad[4:].any()


def test_reduce_without_gradients(make_case: Callable[..., Any]) -> None:
    case = make_case()
    with torch.no_grad():
        loss, _ = reduce(
            case.hidden, case.head, case.targets, lambda s, _: s["log_prob"].sum(), want=["log_prob"]
        )
    assert not loss.requires_grad
    constant, _ = reduce(case.hidden, case.head, case.targets, lambda s, _: torch.ones(()), want=["log_prob"])
    constant.backward()
    assert constant.item() == 1
    assert not case.hidden.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reduce_wants_a_scalar(backend: str, make_case: Callable[..., Any]) -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"shape \(9,\); return the sum"):
        reduce(
            case.hidden,
            case.head,
            case.targets,
            lambda s, _: s["log_prob"],
            want=["log_prob"],
            backend=backend,
        )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("backend", BACKENDS)
def test_reduce_wants_a_tensor(backend: str, make_case: Callable[..., Any]) -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"returned 0\.0; return the sum over the chunk, a scalar tensor"):
        reduce(case.hidden, case.head, case.targets, lambda *_: 0.0, want=["log_prob"], backend=backend)


# --- Head ----------------------------------------------------------------------------------------------


def test_snapshots_stay_and_detached_heads_follow() -> None:
    weight, bias = torch.zeros(3, 2, requires_grad=True), torch.zeros(3, requires_grad=True)
    head = Head(weight, bias, scale=2.0, softcap=5.0, vocabulary=2)
    fixed, following = head.snapshot(), head.detach()
    with torch.no_grad():
        weight += 1
        bias += 1
    for each, value in ((fixed, 0.0), (following, 1.0)):
        assert not each.weight.requires_grad
        assert not each.bias.requires_grad
        assert each.weight.unique().item() == each.bias.unique().item() == value
        assert (each.scale, each.softcap, each.vocabulary, each.tokens) == (2.0, 5.0, 2, 2)
    assert Head(weight).snapshot().bias is Head(weight).detach().bias is None


# --- refusals ------------------------------------------------------------------------------------------


def refuse(match: str, **changes: Any) -> None:
    given: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "head": Head(torch.zeros(6, 4)),
        "targets": torch.tensor([0, 5, 1]),
        "anchors": {"reference": Anchor(torch.zeros(3, 2), Head(torch.zeros(6, 2)))},
        "want": {"log_prob"},
    }
    with pytest.raises(ValueError, match=match):
        score(**(given | changes))


@pytest.mark.usefixtures("unchecked")
def test_refusals_say_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="want is the string 'log_prob'; give a collection"):
        score(torch.zeros(3, 4), Head(torch.zeros(6, 4)), torch.tensor([0, 5, 1]), want="log_prob")
    refuse("'logprob' is wanted; .* knows: log_prob, entropy", want={"logprob"})
    refuse(r"'old.reverse_kl' is wanted; .* reference.log_prob, reference.entropy", want=["old.reverse_kl"])
    refuse("anchor is named 'policy'", anchors={"policy": (torch.zeros(3, 2), Head(torch.zeros(6, 2)))})
    refuse("temperature is 0", temperature=0.0)
    refuse("targets reach from 0 to 6; the vocabulary has 0 to 5", targets=torch.tensor([0, 6, 1]))
    refuse("targets reach from -100 to 1.*Leave out the rows", targets=torch.tensor([0, -100, 1]))
    refuse(r"targets have shape \(2,\); there are 3 rows", targets=torch.tensor([0, 1]))
    refuse(
        "targets are on meta, what is scored on cpu", targets=torch.empty(3, dtype=torch.int64, device="meta")
    )
    refuse(
        "targets reach from 0 to 5; the vocabulary has 0 to 4",
        head=Head(torch.zeros(6, 4), vocabulary=5),
        anchors={},
    )
    refuse(r"'policy' has hidden states of shape \(3, 5\)", hidden=torch.zeros(3, 5))
    refuse(r"'policy' has hidden states of shape \(1, 3, 4\)", hidden=torch.zeros(1, 3, 4))
    refuse(
        "vocabulary of 7 tokens, the policy one of 6",
        anchors={"a": (torch.zeros(3, 2), Head(torch.zeros(7, 2)))},
    )
    refuse(
        "'a' has 2 hidden states, the policy 3", anchors={"a": (torch.zeros(2, 2), Head(torch.zeros(6, 2)))}
    )
    refuse("backend is 'cuda'; it must be one of: auto, chunked, compiled, triton, dense", backend="cuda")
    refuse("chunk_rows is 0", chunk_rows=0)
    refuse("chunk_rows is 4, but the dense backend", chunk_rows=4, backend="dense")


@pytest.mark.usefixtures("unchecked")
def test_heads_that_cannot_be() -> None:
    weight = torch.zeros(6, 4)
    for match, options in (
        (r"bias has shape \(5,\), its weight 6 rows", {"bias": torch.zeros(5)}),
        ("scale is 0", {"scale": 0.0}),
        ("softcap is 0", {"softcap": 0.0}),
        ("vocabulary is 7; the head's weight has 6 rows", {"vocabulary": 7}),
        ("vocabulary is 0", {"vocabulary": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            Head(weight, **options)
