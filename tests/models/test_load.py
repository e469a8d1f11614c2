"""What is saved loads again; what cannot be loaded is explained."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedge.errors import RunError, UserError
from kedge.models import build_model, load_model, load_tokenizer, save_model, train_bpe


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["a small text to learn from, again and again"], 270)


@pytest.fixture
def saved(tokenizer, tmp_path):
    model = build_model(270, hidden_size=16, layers=1, heads=2, context=32, seed=0, pad_id=0, eos_id=1)
    save_model(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_writes_the_same_greedy_text_through_transformers(make, architecture, tmp_path):
    model = make(architecture)
    save_model(model, None, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([[5, 17, 33]])
    texts = [
        each.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0) for each in (model, loaded)
    ]
    assert torch.equal(*texts)
    again = load_model(tmp_path)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert not again.training


def test_a_tokenizer_survives(saved, tokenizer):
    for loaded in (load_tokenizer(saved), AutoTokenizer.from_pretrained(saved)):
        text = "again: 1 ≠ 23\n\tΩ "
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
        assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)


def test_the_dtype_is_the_one_asked_for(saved):
    assert load_model(saved).dtype == torch.float32
    assert load_model(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("source", ["./absent", "/absent/model", "a/b/c", "two words"])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_missing_folder(source, load):
    with pytest.raises(UserError, match="no such folder"):
        load(source)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_an_unreachable_hub(load):
    with pytest.raises(RunError, match=r"'kedge-tests/absent'.*no such folder.*HF_HUB_OFFLINE"):
        load("kedge-tests/absent")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_file_in_place_of_a_folder(saved, load):
    with pytest.raises(UserError, match="is a file"):
        load(saved / "config.json")


def test_a_folder_without_configuration(saved):
    (saved / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(saved)


def test_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer files"):
        load_tokenizer(tmp_path)


def test_a_configuration_without_weights(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"without weights.*copy"):
        load_model(saved)
    (saved / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"without weights.*convert"):
        load_model(saved)


def test_damaged_weights(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"damaged.*again"):
        load_model(saved)


def test_an_unreadable_configuration(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(saved)


def test_an_unknown_architecture(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "model_type": "sextant"}))
    with pytest.raises(UserError, match="sextant"):
        load_model(saved)


def test_weights_that_are_not_in_the_file_are_not_made_up(saved):
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for changed in ({}, {name: tensors[name][1:].clone()}):
        rest = {key: value for key, value in tensors.items() if key != name}
        save_file({**rest, **changed}, saved / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"mlp\.up_proj"):
            load_model(saved)


def test_a_folder_that_cannot_be_written(saved, tokenizer, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match="could not be saved"):
        save_model(load_model(saved), tokenizer, tmp_path / "taken")


def test_a_full_disk_is_reported(saved, tokenizer):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    target = saved / "copy"
    target.mkdir()
    (target / "model.safetensors").symlink_to("/dev/full")
    (target / "config.json").symlink_to("/dev/full")
    with pytest.raises(RunError, match="No space left"):
        save_model(load_model(saved), tokenizer, target)


def test_nothing_reaches_the_screen(saved):
    script = (
        "import sys; from kedge.models import load_model, load_tokenizer, save_model\n"
        "path = sys.argv[1]; save_model(load_model(path), load_tokenizer(path), path + '/again')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(saved)], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
