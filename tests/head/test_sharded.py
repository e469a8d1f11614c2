"""A head sharded over two processes (gloo) gives what the whole head gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kedge.head import Head, reduce, score

ROOT = Path(__file__).parents[2]
V, H, N = 11, 4, 6  # 11 rows over two processes: 6 and 5
WANT = ["log_prob", "entropy", "reference.reverse_kl", "reference.forward_kl"]


def numbers() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator)

    return {
        "hidden": draw(2, N, H),
        "reference": draw(2, N, H),
        "weight": draw(V, H),
        "bias": draw(V),
        "fixed": draw(V, H),
        "targets": torch.randint(0, V, (2, N), generator=generator),
    }


def run(way: str, given: dict[str, Tensor], rank: int, head: Head, fixed: Tensor) -> tuple[Tensor, Tensor]:
    """Values [4, N] of the tokens of a rank, and the loss: a sum of them all."""
    call = {
        "hidden": given["hidden"][rank].detach().requires_grad_(),
        "head": head,
        "targets": given["targets"][rank],
        "anchors": {"reference": (given["reference"][rank], Head(fixed))},
        "want": WANT,
    }
    if way == "reduce":
        loss, scores = reduce(
            **call, per_token=lambda scores, rows: sum(each.sum() for each in scores.values()), chunk_rows=4
        )
    else:
        backend = {"backend": "dense"} if way == "dense" else {"chunk_rows": 4}
        scores = score(**call, **backend)
        loss = sum(each.sum() for each in scores.values())
    return torch.stack([scores[name].detach() for name in WANT]), loss


def in_a_process(rank: int, store: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh, given = init_device_mesh("cpu", (2,)), numbers()
    whole = {name: given[name].clone().requires_grad_() for name in ("weight", "bias")}
    losses = []
    for each in range(2):
        values, loss = run("dense", given, each, Head(**whole), given["fixed"])
        losses.append(loss)
        if each == rank:
            true = values
    (sum(losses) / 2).backward()

    shards = {name: distribute_tensor(given[name], mesh, [Shard(0)]) for name in ("weight", "bias")}
    fixed = distribute_tensor(given["fixed"], mesh, [Shard(1)])  # spread another way, and frozen
    for way in ("score", "reduce", "dense"):
        mine = {name: _again(shard) for name, shard in shards.items()}
        with CommDebugMode() as traffic:
            values, loss = run(way, given, rank, Head(**mine), fixed)
            loss.backward()
        counts = {str(each).rpartition(".")[2]: count for each, count in traffic.get_comm_counts().items()}
        assert counts == {"all_gather_into_tensor": 3, "reduce_scatter_tensor": 2}, (way, counts)
        torch.testing.assert_close(values, true, rtol=1e-12, atol=1e-12)
        for name, shard in mine.items():
            assert isinstance(shard.grad, DTensor)
            assert shard.grad.placements == (Shard(0),)
            rows = slice(0, 6) if rank == 0 else slice(6, 11)
            torch.testing.assert_close(shard.grad.to_local(), whole[name].grad[rows], rtol=1e-12, atol=1e-12)

    # the same tokens in every process, as in tensor parallelism: the mean of equal gradients is the gradient
    same = {name: _again(shard) for name, shard in shards.items()}
    run("score", given, 0, Head(**same), fixed)[1].backward()
    whole["weight"].grad = None
    run("dense", given, 0, Head(**whole), given["fixed"])[1].backward()
    torch.testing.assert_close(same["weight"].grad.full_tensor(), whole["weight"].grad)

    try:
        score(
            distribute_tensor(given["hidden"][0], mesh, [Shard(0)]),
            Head(given["weight"]),
            given["targets"][0],
            want=["log_prob"],
        )
    except ValueError as error:
        assert "hidden states of 'policy' are a DTensor" in str(error)  # noqa: PT017
    else:
        raise AssertionError("hidden states that are sharded were not refused")
    dist.destroy_process_group()


def _again(shard: Tensor) -> Tensor:
    return shard.detach().requires_grad_()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_sharded_head_is_gathered_once(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-4000:]


if __name__ == "__main__":
    in_a_process(int(sys.argv[1]), sys.argv[2])
