"""`hooked-vlm verify` passes on the bundled models, fails where a weight was changed, and says what it cannot do."""

import json
import logging
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import tiny_internvl
import tiny_qwen2_5_vl
import tiny_qwen3_vl
import torch
from families import KINDS, plain_first
from reading_gemma import reading
from safetensors.torch import save_file
from torch import nn
from whole_folders import save_whole

from hooked_vlm import HookedVLM, InputError, cli
from hooked_vlm.commands.verify import VerifyConfig
from hooked_vlm.loading.folders import TOY_MODELS
from hooked_vlm.loading.quantisation import quiet_torchao
from hooked_vlm.model.fingerprints import weights_hash
from hooked_vlm.verify import run
from hooked_vlm.verify.compare import cost, differences, equal_tokens, pixels, prompt_tokens, rounding_errors
from hooked_vlm.verify.prompt_suite import QUICK, inputs_for, prompts
from hooked_vlm.verify.reference import Reference, reference_for, reference_processor, reference_prompt
from hooked_vlm.verify.result import Row, Verification
from hooked_vlm.verify.run import verify

TOYS = ("toy-qwen2-vl", "toy-internvl2")


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Reference]:
    model = HookedVLM.from_pretrained(name, dtype=dtype)
    return model, reference_for(model, TOY_MODELS / name)


def perturb(linear: Any, by: float) -> None:
    """A matrix in its own storage (the two models may share theirs) with noise of a share of its size."""
    noise = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(0))
    weight = linear.weight.detach()
    linear.weight = nn.Parameter((weight + by * weight.std() * noise).to(weight.dtype))


def failed(rows: list[Row]) -> set[str]:
    return {row.quantity for row in rows if not row.passed}


@pytest.mark.parametrize("name", TOYS)
def test_the_bundled_models_pass(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "verify.json"
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", "verify", name, "--out", str(out), "--max-new-tokens", "6"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed, told = capsys.readouterr().out, json.loads(out.read_text())
    assert stopped.value.code == 0 and told["passed"] and "agrees" in printed and "FAIL" not in printed
    assert "GB" in printed.splitlines()[0]
    rows = {(row["quantity"], row["layer"]): row for row in told["rows"]}
    assert all(row["passed"] for row in rows.values())
    model = HookedVLM.from_pretrained(name)
    assert told["weights"] == weights_hash(model) and told["seed"] == 0 and told["dtype"] == "float32"
    assert {"torch", "transformers", "hooked-vlm"} <= set(told["versions"])
    assert ("remote code" in told["reference"]) == (name == "toy-internvl2")
    expected = [("attention pattern", i) for i in range(4)] + [("residual stream", i) for i in range(5)]
    expected += [("vision residual stream", i) for i in range(3)]
    expected += [(q, None) for q in ("logits", "image features", "image preprocessing", "greedy tokens")]
    assert set(expected) <= set(rows)
    assert (("prompts", None) in rows) == (name == "toy-qwen2-vl")  # published InternVL only names its template
    for quantity, layer in expected[:-2]:
        row = rows[quantity, layer]
        bound = 2e-5 if quantity == "attention pattern" else 1e-4 * max(1.0, row["largest"] / 10)
        assert 0 <= row["value"] <= row["tolerance"] == bound
    assert rows["greedy tokens", None]["value"] == rows["greedy tokens", None]["largest"] >= 5
    assert told["prompts"].keys() == {prompt.name for prompt in prompts()}


def test_a_quick_comparison_is_of_text_and_one_picture_without_times(tmp_path: Path) -> None:
    asked = VerifyConfig("toy-internvl2", out=tmp_path / "verify.json", max_new_tokens=2, quick=True, quiet=True)
    found = verify(asked)
    told = json.loads(asked.out.read_text())
    assert found.passed and tuple(told["prompts"]) == QUICK == tuple(p.name for p in prompts(quick=True))
    quantities = {row["quantity"] for row in told["rows"]}
    assert {"image preprocessing", "image features", "vision residual stream", "greedy tokens"} <= quantities
    assert not {"time of a forward pass", "peak memory of a forward pass"} & quantities


OF_THEIR_OWN_CLASS = (
    "qwen2.5-vl", "qwen3-vl", "llava", "llava-next", "llava-onevision", "gemma3", "paligemma2", "idefics3",
    "smolvlm, tied",
)  # fmt: skip


@pytest.mark.parametrize("name", OF_THEIR_OWN_CLASS)
@torch.no_grad()
def test_a_family_is_compared_with_the_class_of_transformers(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    kind.hf().save_pretrained(tmp_path)
    model: Any = HookedVLM.from_pretrained(tmp_path)
    reference = reference_for(model, tmp_path)
    inputs = model.inputs_from_hf(kind.batch(kind.cases["images-of-two-sizes"]))
    rows = differences(model, reference, [inputs])
    assert not failed(rows)
    compared = {row.quantity for row in rows}
    assert {"image features", "vision residual stream", "attention pattern", "logits"} <= compared
    assert ("DeepStack features" in compared) == (name == "qwen3-vl")
    assert equal_tokens(model, reference, [inputs], 4, must=True).passed
    processor = reference_processor(model, tmp_path)
    assert pixels(model, processor, prompts()).passed


def whole(family: str) -> Any:
    """The model of a whole folder."""
    with TemporaryDirectory() as folder:
        return HookedVLM.from_pretrained(save_whole(family, Path(folder) / "model"))


READING = {
    "qwen2.5-vl": (tiny_qwen2_5_vl.reading_model, {"max_pixels": 64 * 100}),
    "qwen3-vl": (tiny_qwen3_vl.reading_model, {"max_pixels": 64 * 100}),
    "gemma3": (partial(reading, "gemma3"), {"image_mean": [0.4, 0.5, 0.6], "resample": 3}),
    "paligemma": (partial(reading, "paligemma"), {"image_std": [0.4, 0.5, 0.6], "resample": 2}),
    "paligemma2": (partial(reading, "paligemma2"), {}),
    "idefics3": (partial(whole, "idefics3"), {"image_mean": [0.4, 0.5, 0.6]}),
    "smolvlm": (partial(whole, "smolvlm"), {}),
}
"""Models with a tokenizer, and settings of pictures that their folders have instead of the published ones."""


@pytest.mark.parametrize("family", plain_first(READING))
def test_a_folder_of_a_later_family_passes_from_pixels_to_greedy_tokens(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make, changes = READING[family]
    make().save_pretrained(tmp_path / "model")
    settings = tmp_path / "model" / "preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **changes}))
    out = tmp_path / "verify.json"
    asked = ["hooked-vlm", "verify", str(tmp_path / "model"), "--out", str(out), "--max-new-tokens", "3"]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    told = json.loads(out.read_text())
    passed = {row["quantity"]: row["passed"] for row in told["rows"]}
    assert all(passed.values()) and {"prompts", "image preprocessing", "greedy tokens", "logits"} <= set(passed)
    assert told["reference"].startswith("transformers") and "same folder" in told["reference"]


def test_a_changed_weight_of_the_reference_ends_in_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tampered(model: Any, folder: Path) -> Reference:
        reference = reference_for(model, folder)
        perturb(reference.model.model.language_model.layers[2].self_attn.v_proj, 0.01)
        return reference

    out = tmp_path / "verify.json"
    monkeypatch.setattr(run, "reference_for", tampered)
    asked = ["hooked-vlm", "verify", "toy-internvl2", "--quick", "--out", str(out), "--max-new-tokens", "2"]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = json.loads(out.read_text())
    assert stopped.value.code == 1 and not told["passed"] and "FAIL" in capsys.readouterr().out
    wrong = {(row["quantity"], row["layer"]) for row in told["rows"] if not row["passed"]}
    # what comes before the changed matrix agrees
    assert ("logits", None) in wrong and ("residual stream", 3) in wrong and ("residual stream", 2) not in wrong


PLACES = {
    "vision": (lambda model: model.vision.blocks[1].mlp.out_proj, {"image features", "vision residual stream"}),
    "projector": (lambda model: model.projector.in_proj, {"image features", "logits"}),
    "queries": (lambda model: model.blocks[1].attn.q_proj, {"attention pattern"}),
    "unembedding": (lambda model: model.unembed, {"logits"}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_changed_weight_of_ours_is_seen(place: str) -> None:
    model, reference = load("toy-qwen2-vl")
    asked = [inputs_for(model, prompts()[1])]
    part, quantities = PLACES[place]
    perturb(part(model), 0.01)
    assert quantities <= failed(differences(model, reference, asked))


def test_low_precision_is_held_against_an_exact_run(tmp_path: Path) -> None:
    found = verify(VerifyConfig("toy-qwen2-vl", "bfloat16", out=tmp_path / "verify.json", max_new_tokens=2, quick=True))
    rows = {(row.quantity, row.layer): row for row in found.rows}
    assert found.passed and found.record["errors against"] == "float64"
    assert 0.8 < rows["logits", None].value <= 1.1 and rows["logits", None].unit == "ratio"
    assert (rows["logits", None].reference or 0) > 1e-3


def test_a_worse_rounding_than_the_references_fails() -> None:
    model, reference = load("toy-internvl2", torch.bfloat16)
    exact = Reference(load("toy-internvl2", torch.bfloat16)[1].model.double(), "exact")
    asked = [inputs_for(model, prompts()[1])]
    assert not failed(rounding_errors(model, reference, exact, asked))
    perturb(model.unembed, 0.02)
    assert failed(rounding_errors(model, reference, exact, asked)) == {"logits"}


@pytest.mark.parametrize("kind", tiny_internvl.KINDS)
def test_every_language_model_of_internvl_has_a_reference(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_internvl.original_config(kind)))
    save_file({name: t.contiguous() for name, t in tiny_internvl.by_hand(kind).items()}, tmp_path / "model.safetensors")
    model = HookedVLM.from_pretrained(tmp_path)
    reference = reference_for(model, tmp_path)
    asked = [model.inputs_from_hf(tiny_internvl.hf_batch([[5, ("image", 1), 7, 8, 9]]))]
    assert not failed(differences(model, reference, asked))
    assert equal_tokens(model, reference, asked, 3, must=True).passed
    assert ("equivalent" in reference.description) == (kind == "llama-dynamic")


def test_differences_equal_a_literal_comparison() -> None:
    model, reference = load("toy-qwen2-vl")
    asked = [inputs_for(model, prompt) for prompt in (prompts()[0], prompts()[3])]
    perturb(model.blocks[3].mlp.out_proj, 0.1)
    rows = {(row.quantity, row.layer): row for row in differences(model, reference, asked)}
    with torch.no_grad():
        theirs = [reference.model(**reference.batch(inputs)).logits for inputs in asked]
        apart = [(model(inputs) - logits).abs().max() for inputs, logits in zip(asked, theirs, strict=True)]
    assert rows["logits", None].value == pytest.approx(float(max(apart)), rel=1e-3)
    assert rows["logits", None].largest == pytest.approx(float(max(t.abs().max() for t in theirs)), rel=1e-4)
    assert not rows["logits", None].passed and rows["residual stream", 3].passed


def test_tokens_count_up_to_the_first_that_differs() -> None:
    model, reference = load("toy-qwen2-vl")
    asked = [inputs_for(model, prompts()[1])]
    n = asked[0].shape[1]
    ours = model.generate(asked[0], 4)[0, n:].tolist()
    other = [*ours[:1], (ours[1] + 1) % 280, *ours[2:]]

    class Other:
        def generate(self, **_: Any) -> torch.Tensor:
            return torch.cat((asked[0].tokens, torch.tensor([other])), dim=1)

        def parameters(self) -> Any:
            return reference.model.parameters()

    row = equal_tokens(model, Reference(Other(), "another"), asked, 4, must=True)
    assert (row.value, row.tolerance, row.passed) == (1, len(ours), False)


def test_costs_are_of_both() -> None:
    model, reference = load("toy-internvl2")
    seconds, peak = cost(model, reference, inputs_for(model, prompts()[0]))
    assert min(seconds.value, seconds.reference or 0) > 0 and seconds.passed
    assert peak.value > 1e5 and (peak.reference or 0) > 1e5


@pytest.mark.parametrize("release", ["5.9.0", "5.22.2"])
def test_a_release_of_transformers_that_is_no_reference_is_refused(
    release: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers.__version__", release)
    with pytest.raises(InputError, match=release):
        verify(VerifyConfig("toy-qwen2-vl", out=tmp_path / "verify.json"))
    assert not list(tmp_path.iterdir())


def test_rows_pass_and_fail() -> None:
    assert Row("a", 1e-5, 1e-4).passed and not Row("a", 1e-3, 1e-4).passed
    assert not Row("a", float("nan"), 1e-4).passed and Row("a", 5.0, None).passed
    assert Row("t", 4, 4, "tokens", largest=4).passed and not Row("t", 3, 4, "tokens", largest=4).passed
    rows = (Row("a", 1e-5, 1e-4, layer=0), Row("a", float("inf"), 1e-4, layer=1), Row("b", 0.0, 1e-4))
    found = Verification("m", "r", "float32", rows, {"seed": 0})
    assert not found.passed and found.as_dict()["rows"][1]["value"] is None
    lines = found.table().splitlines()
    assert len(lines) == 3 and lines[1].startswith("a, layer 1 ") and lines[1].endswith("FAIL")
    assert len(found.table(layers=True).splitlines()) == 4


def test_rows_that_do_not_decide_say_so() -> None:
    deciding = (Row("a", 1e-5, 1e-4), Row("t", 3, 4, "tokens", largest=4), Row("r", 1.0, 1.1, "ratio"))
    open_ = (Row("b", 5.0, None), Row("t2", 3, None, "tokens", largest=4), Row("r2", 9.0, None, "ratio"),
             Row("time", 1.0, None, "s", reference=2.0), Row("peak", 10, None, "bytes", reference=20))  # fmt: skip
    lines = Verification("m", "r", "float32", (*deciding, *open_), {}).table().splitlines()[1:]
    assert [line.endswith("none") for line in lines] == [False] * 3 + [True] * 5
    assert lines[1].endswith("FAIL") and lines[0].endswith("pass")


# ---------------------------------------------------------------- the folder's own files


def changed(folder: Path, name: str, file: str, **content: Any) -> Path:
    """A copy of a bundled model with other settings in one file."""
    shutil.copytree(TOY_MODELS / name, folder)
    before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**before, **content}))
    return folder


GENERATION = {
    "penalty": {"repetition_penalty": 1.5},
    "n-grams": {"no_repeat_ngram_size": 1},
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 5},
    "at least": {"min_new_tokens": 12},
    "beams": {"num_beams": 3, "length_penalty": 2.0},
    "suppressed": {"suppress_tokens": list(range(100, 280))},
    "begin": {"begin_suppress_tokens": list(range(280))},
    "forced end": {"forced_eos_token_id": 7},
    "bad words": {"bad_words_ids": [[i] for i in range(100, 280)]},
}


@pytest.mark.parametrize("kind", GENERATION)
def test_the_reference_generates_with_neutral_settings(kind: str, tmp_path: Path) -> None:
    folder = changed(tmp_path / "toy", "toy-qwen2-vl", "generation_config.json", **GENERATION[kind])
    model = HookedVLM.from_pretrained(folder)
    reference = reference_for(model, folder)
    asked = [inputs_for(model, prompt) for prompt in prompts()[:2]]
    assert equal_tokens(model, reference, asked, 8, must=True).passed
    with torch.no_grad():  # greedy by hand, one forward pass of the reference a token
        ids = asked[0].tokens
        for _ in range(4):
            theirs = reference.model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits[0, -1]
            ids = torch.cat((ids, theirs.argmax().reshape(1, 1)), dim=1)
    n = min(4, model.generate(asked[0], 4).shape[1] - asked[0].shape[1])
    assert torch.equal(model.generate(asked[0], n)[0], ids[0, : asked[0].shape[1] + n])


def test_a_sound_checkpoint_with_a_penalty_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = changed(tmp_path / "toy", "toy-qwen2-vl", "generation_config.json", repetition_penalty=1.05)
    asked = VerifyConfig(str(folder), out=tmp_path / "verify.json", max_new_tokens=4, quick=True)
    found = verify(asked)
    assert found.passed and "greedy tokens" in {row.quantity for row in found.rows}
    assert "prompt" in capsys.readouterr().err  # a bar counts prompts
    verify(replace(asked, quiet=True))
    assert "prompt" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["qwen2-vl", "internvl-original", "internvl-hf"])
def test_pictures_are_prepared_from_the_folders_own_settings(name: str, tmp_path: Path) -> None:
    """The reference's pixels follow the files even where the model's processor was changed, and then differ."""
    toy = "toy-qwen2-vl" if name == "qwen2-vl" else "toy-internvl2"
    folder = tmp_path / "toy"
    if name == "internvl-hf":
        HookedVLM.from_pretrained(toy).save_pretrained(folder, layout="hf")
    else:
        shutil.copytree(TOY_MODELS / toy, folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.25] * 3, "image_std": [0.5] * 3}
    if name == "internvl-original":
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    else:
        (folder / "preprocessor_config.json").unlink()
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    model: Any = HookedVLM.from_pretrained(folder)
    row = pixels(model, reference_processor(model, folder), prompts())
    assert row.passed
    model.image_processor = replace(model.image_processor, image_mean=(0.3, 0.3, 0.3))
    assert not pixels(model, reference_processor(model, folder), prompts()).passed


@pytest.mark.parametrize("name", ["qwen2-vl", "internvl-hf"])
def test_prompts_are_compared_with_the_template_of_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    layout = None if name == "qwen2-vl" else "hf"
    HookedVLM.from_pretrained("toy-qwen2-vl" if layout is None else "toy-internvl2").save_pretrained(
        folder, layout=layout
    )
    model: Any = HookedVLM.from_pretrained(folder)
    template = model.tokenizer.chat_template
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "total " + template}))
    for expected in (False, True):
        inputs = [inputs_for(model, prompt) for prompt in prompts()]
        render = reference_prompt(model, folder)
        assert render is not None and prompt_tokens(model, render, prompts(), inputs).passed == expected
        model = HookedVLM.from_pretrained(folder)
    assert reference_prompt(HookedVLM.from_pretrained("toy-internvl2"), TOY_MODELS / "toy-internvl2") is None


def test_torchao_is_imported_without_noise(caplog: pytest.LogCaptureFixture) -> None:
    names = ("torchao", "torch.utils._pytree")
    with quiet_torchao():
        for name in names:
            logging.getLogger(name).warning("noise")
            logging.getLogger(name).error("a fault")
    assert [record.message for record in caplog.records] == ["a fault"] * 2
    assert all(logging.getLogger(name).level == logging.NOTSET for name in names[:1])


# ---------------------------------------------------------------- what cannot be compared


def test_too_little_memory_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "free_memory", lambda device: 20 * 10**9)
    monkeypatch.setattr(HookedVLM, "from_pretrained", None)
    with pytest.raises(InputError, match=r"cpu.*20\.0 GB.*--dtype bfloat16"):
        verify(VerifyConfig("Qwen/Qwen2-VL-7B-Instruct", device="cpu", out=tmp_path / "verify.json"))


def test_what_has_no_reference_is_refused(tmp_path: Path) -> None:
    model, _ = load("toy-internvl2")
    model.cfg = model.cfg.with_(original_architecture="InternLM2ForCausalLM")
    with pytest.raises(InputError, match="InternLM2ForCausalLM"):
        reference_for(model, tmp_path)
    with pytest.raises(InputError, match="--max-new-tokens"):
        verify(VerifyConfig("toy-internvl2", max_new_tokens=0, out=tmp_path / "verify.json"))


def test_the_pictures_are_the_same_for_a_seed() -> None:
    once, again, other = (prompts(seed) for seed in (0, 0, 1))
    assert [p.text for p in once] == [p.text for p in other]
    for a, b in zip(once, again, strict=True):
        assert [x.tobytes() for x in a.pictures] == [x.tobytes() for x in b.pictures]
    assert once[2].pictures[0].tobytes() != other[2].pictures[0].tobytes()
    assert [len(p.pictures) for p in once] == [0, 1, 1, 1, 2] and once[3].pictures[0].mode == "RGBA"
