"""Models and adapters from outside: whole model folders afterwards, or refused by their headers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixmerge.errors import ModelError
from mixmerge.model.adopt import adopt, check_adopted, is_adapter


@pytest.fixture
def expert(tiny_base: Path, tmp_path: Path) -> Path:
    """The base with other weights, as a training elsewhere would leave it."""
    folder = tmp_path / "expert+v2"
    shutil.copytree(tiny_base, folder)
    tensors = {name: tensor + 0.01 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    """A real LoRA of the base by PEFT, its weights drawn at random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "poet")
    return tmp_path / "poet"


def test_a_whole_model_is_linked_with_all_that_loaders_read(expert, tiny_base, tmp_path):
    check_adopted(expert, tiny_base)
    assert adopt(expert, tiny_base, tmp_path / "out") is False
    assert (tmp_path / "out" / "model.safetensors").samefile(expert / "model.safetensors")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (expert / "tokenizer.json").read_bytes()


def test_an_adapter_becomes_the_model_that_peft_computes(adapter, tiny_base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert is_adapter(adapter)
    assert not is_adapter(tiny_base)
    check_adopted(adapter, tiny_base)
    seen = []
    assert adopt(adapter, tiny_base, tmp_path / "out", progress=lambda done, total: seen.append((done, total))) is True
    assert seen[-1][0] == seen[-1][1] > 0
    ids = torch.arange(5, 25)[None]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), adapter)
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        expected, found, before = (model(ids).logits for model in (theirs, mine, plain))
    assert (expected - before).abs().max() > 10 * (expected - found).abs().max()


def test_a_model_without_a_chat_template_gets_that_of_its_start(expert, tiny_base, tmp_path):
    settings = json.loads((expert / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (expert / "tokenizer_config.json").write_text(json.dumps(settings))
    (expert / "chat_template.jinja").unlink(missing_ok=True)
    adopt(expert, tiny_base, tmp_path / "out")
    from transformers import AutoTokenizer

    templates = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (tmp_path / "out", tiny_base)]
    assert templates[0] == templates[1] is not None
    assert {path.name for path in tmp_path.iterdir()} == {expert.name, "out"}


def test_what_does_not_fit_its_start_is_refused_from_headers_with_the_names_that_were_given(
    expert, adapter, tiny_base, tmp_path
):
    tensors = load_file(expert / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file(tensors | {name: torch.zeros(3, 5)}, expert / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"has shape .* and \[3, 5\] in '.*expert\+v2'"):
        check_adopted(expert, tiny_base)
    weights = load_file(adapter / "adapter_model.safetensors")
    renamed = {key.replace("layers.0", "layers.7"): tensor for key, tensor in weights.items()}
    save_file(renamed, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        adopt(adapter, tiny_base, tmp_path / "out")
    assert "layers.7" in str(caught.value)
    assert "/tmp/tmp" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_neither_model_nor_adapter_is_refused(tmp_path, adapter, tiny_base):
    with pytest.raises(ModelError, match="no such folder"):
        check_adopted(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty: no config.json"):
        check_adopted(tmp_path / "empty")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"an adapter without adapter_model.safetensors; save the adapter with"):
        check_adopted(adapter)
    with pytest.raises(ModelError, match="are the same model"):
        check_adopted(tiny_base, tiny_base)


def test_the_record_of_another_study_stays_behind(expert, tiny_base, tmp_path):
    (expert / "record.json").write_text("{}")
    adopt(expert, tiny_base, tmp_path / "out")
    assert not (tmp_path / "out" / "record.json").exists()
