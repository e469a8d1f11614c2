"""Adapters that peft wrote, merged into their base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kedge.errors import UserError
from kedge.models import build_model, load_model, save_model
from kedge.models.adapter import base_of, is_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = build_model(32, hidden_size=16, layers=1, heads=2, context=16, seed=0)
    save_model(model, None, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, for names that transformers renames
def test_a_merged_adapter_gives_the_logits_of_the_adapted_model(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, lora_alpha=8)
    adapted = peft.get_peft_model(load_model(base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapted.base_model.config.name_or_path = str(base)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        truth = adapted.eval()(input_ids=ids).logits
        found = load_model(tmp_path / "adapter")(input_ids=ids).logits
        unchanged = load_model(base)(input_ids=ids).logits
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, unchanged, atol=1e-2)
    assert load_model(tmp_path / "adapter", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_what_an_adapter_belongs_to(tmp_path: Path) -> None:
    assert not is_adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"base_model_name_or_path": "owner/name"}))
    assert is_adapter(tmp_path)
    assert base_of(tmp_path) == "owner/name"
    for content, match in (
        ("{", "cannot be read"),
        ("{}", "does not name the model"),
        ("[]", "cannot be read"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=match):
            base_of(tmp_path)
