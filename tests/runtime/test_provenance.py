"""What results record of themselves."""

from pathlib import Path

import torch

from hooked_vlm import HookedVLM
from hooked_vlm.model.fingerprints import provenance, weights_hash
from hooked_vlm.runtime import provenance as provenance_module
from hooked_vlm.runtime.provenance import code_hash


def test_the_record_names_model_code_and_kernel() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    record = provenance(model)
    assert (record["model"], record["dtype"], record["device"]) == ("toy-qwen2-vl", "float32", "cpu")
    assert record["weights"] == weights_hash(model) and record["code"] == code_hash()
    assert "fused" in record["attention"] and {"torch", "hooked-vlm", "python"} <= set(record["versions"])


@torch.no_grad()
def test_the_weights_hash_sees_one_changed_bit_and_every_exchange() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    weight, norm = model.blocks[1].mlp.W_in, model.ln_final.weight
    before, saved, saved_norm = weights_hash(model), weight.clone(), norm.clone()
    n = weight.numel()
    seen = {before}
    for exchange in (weight.flip(0), weight.flip(1), weight.roll(1, 0), weight.flatten().roll(n // 2).view_as(weight)):
        weight.copy_(exchange)
        seen.add(weights_hash(model))
        weight.copy_(saved)
    weight[3, 5], weight[3, 9] = saved[3, 9], saved[3, 5]
    seen.add(weights_hash(model))
    weight.copy_(saved)
    norm.copy_(norm.flip(0))
    seen.add(weights_hash(model))
    norm.copy_(saved_norm)
    model.embed.weight[5, 7] = torch.nextafter(model.embed.weight[5, 7], torch.tensor(torch.inf))
    seen.add(weights_hash(model))
    assert len(seen) == 8
    model.embed.weight[5, 7] = torch.nextafter(model.embed.weight[5, 7], torch.tensor(-torch.inf))
    assert weights_hash(model) == before


def test_the_weights_hash_sees_the_configuration_but_not_where_the_model_is() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    before = weights_hash(model)
    model.cfg = model.cfg.with_(model_name="elsewhere", device=torch.device("meta"))
    assert weights_hash(model) == before
    model.cfg = model.cfg.with_(rope_theta=2 * model.cfg.rope_theta)
    assert weights_hash(model) != before


def test_the_code_hash_is_of_every_file_once_wherever_it_lies(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "whole" / "part").mkdir(parents=True)
    (tmp_path / "whole" / "a.py").write_text("a = 1\n")
    (tmp_path / "whole" / "part" / "b.py").write_text("b = 2\n")
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "b.py").write_text("b = 2\n")

    def hashed(folder_of_part: str) -> str:
        folders = {"whole": tmp_path / "whole", "whole.part": tmp_path / folder_of_part}
        monkeypatch.setattr(provenance_module, "OWN", tuple(folders))
        monkeypatch.setattr(provenance_module, "_folder", folders.__getitem__)
        return code_hash.__wrapped__()

    installed = hashed("whole/part")
    assert hashed("apart") == installed  # as in a checkout, where the part lies beside the whole
    (tmp_path / "apart" / "b.py").write_text("b = 3\n")
    assert hashed("apart") != installed
