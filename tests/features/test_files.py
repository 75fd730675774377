"""Dictionaries come back from files as they were made, and foreign ones as they were trained; others are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import ACTIVATIONS, RESID, random_dictionary
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_vlm.errors import FeatureError, OutputError
from hooked_vlm.features import Dictionary, load_dictionary, save_dictionary

D, N = 6, 10
MLP_IN, MLP_OUT = "blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"


def saelens(folder: Path, tensors: dict[str, Tensor], weights: str = "sae_weights.safetensors", **cfg: Any) -> Path:
    """A folder of a version before 6, unless the settings say otherwise."""
    folder.mkdir(exist_ok=True)
    own = {"d_in": D, "d_sae": N, "dtype": "torch.float32", "hook_name": RESID, "apply_b_dec_to_input": True}
    (folder / "cfg.json").write_text(json.dumps({**own, **cfg}))
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / weights)
    return folder


def same(found: Dictionary, own: Dictionary) -> None:
    assert {**vars(found), **found.tensors}.keys() == {**vars(own), **own.tensors}.keys()
    for name, value in vars(own).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(getattr(found, name), value, atol=1e-6, rtol=1e-6)
        elif name != "metadata":
            assert getattr(found, name) == value, name


@pytest.mark.parametrize("kind", ["autoencoder", "transcoder", "skip transcoder"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_saved_comes_back_bit_for_bit(activation: str, kind: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"normalisation": "layer_norm", "apply_b_dec_to_input": True}
    if kind != "autoencoder":
        fields = {"hook_name": MLP_IN, "out_hook_name": MLP_OUT, "d_out": 4}
    if kind == "skip transcoder":
        fields["W_skip"] = torch.randn(4, D)
    own = random_dictionary(D, N, activation=activation, metadata={"model_name": "toy", "steps": 3}, **fields)
    found = load_dictionary(save_dictionary(own, tmp_path / "own"))
    same(found, own)
    assert all(torch.equal(x, own.tensors[name]) for name, x in found.tensors.items())
    assert dict(found.metadata) == {"model_name": "toy", "steps": 3, "sae_lens_version": "6.0.0"}
    assert load_dictionary(save_dictionary(own.to(torch.bfloat16), tmp_path / "own")).W_enc.dtype == torch.bfloat16
    assert sorted(file.name for file in (tmp_path / "own").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_versions_before_6(tmp_path: Path) -> None:
    own = random_dictionary(D, N, apply_b_dec_to_input=True)
    tensors = own.tensors
    oldest = {"hook_name": None, "hook_point": RESID, "activation_fn_str": "relu", "normalize_activations": False}
    ones = {"scaling_factor": torch.ones(N)}
    same(load_dictionary(saelens(tmp_path / "3", tensors | ones, **oldest)), own)
    (tmp_path / "3" / "sparsity.safetensors").write_bytes(b"beside it")
    same(load_dictionary(tmp_path / "3"), own)
    topk = random_dictionary(D, N, activation="topk", apply_b_dec_to_input=True)
    as_function = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    same(load_dictionary(saelens(tmp_path / "4", topk.tensors, **as_function)), topk)
    own = random_dictionary(D, N, activation="gated", apply_b_dec_to_input=True, normalisation="layer_norm")
    gated = {("b_gate" if name == "b_enc" else name): x for name, x in own.tensors.items()}
    found = load_dictionary(
        saelens(tmp_path / "5", gated, architecture="gated", normalize_activations="layer_norm", model_name="gpt2")
    )
    same(found, own)
    assert dict(found.metadata) == {"model_name": "gpt2"}


def test_a_learned_threshold_stands_for_the_largest_of_a_batch(tmp_path: Path) -> None:
    own = random_dictionary(D, N, activation="jumprelu", apply_b_dec_to_input=True)
    same(load_dictionary(saelens(tmp_path / "a", own.tensors, architecture="batchtopk", k=3)), own)
    others = {name: x for name, x in own.tensors.items() if name != "threshold"}
    one = saelens(tmp_path / "b", others | {"topk_threshold": torch.tensor(0.3)}, architecture="matryoshka_batchtopk")
    same(load_dictionary(one), replace(own, threshold=torch.full((N,), 0.3)))
    assert own.threshold is not None
    log = saelens(tmp_path / "c", others | {"log_threshold": own.threshold.log()}, architecture="jumprelu")
    same(load_dictionary(log), own)


def test_the_norm_of_the_decoder_is_folded_as_saelens_uses_it(tmp_path: Path) -> None:
    own = random_dictionary(D, N, activation="topk", apply_b_dec_to_input=True)
    folder = saelens(tmp_path / "own", own.tensors, architecture="topk", k=5, rescale_acts_by_decoder_norm=True)
    found = load_dictionary(folder)
    x = torch.randn(7, D)
    norm = own.W_dec.norm(dim=-1)
    pre = ((x - own.b_dec) @ own.W_enc + own.b_enc) * norm
    for row in range(7):
        kept = pre[row].argsort(descending=True)[:5]
        features = torch.zeros(N)
        features[kept] = pre[row, kept].relu()
        torch.testing.assert_close(found.encode(x[row]), features)
        torch.testing.assert_close(found.decode(features), (features / norm) @ own.W_dec + own.b_dec)


def test_a_constant_factor_is_found_or_asked_for(tmp_path: Path) -> None:
    own = random_dictionary(D, N, apply_b_dec_to_input=True)
    folder = saelens(tmp_path / "own", own.tensors, normalize_activations="expected_average_only_in")
    with pytest.raises(FeatureError, match=r"give scale, or 1\.0"):
        load_dictionary(folder)
    same(load_dictionary(folder, scale=2.0), own.rescaled(2.0))
    scaler = folder / "activation_scaler.json"
    scaler.write_text(json.dumps({"scaling_factor": "0.5"}))
    with pytest.raises(FeatureError, match=r"a setting .* has another form"):
        load_dictionary(folder)
    scaler.write_text(json.dumps({"scaling_factor": 0.5}))
    same(load_dictionary(folder), own.rescaled(0.5))
    over = saelens(tmp_path / "over", own.tensors, normalize_activations="expected_average_only_in")
    (over / scaler.name).write_text(scaler.read_text())
    save_dictionary(load_dictionary(over), over)
    same(load_dictionary(over), own.rescaled(0.5))  # not scaled once more
    scaler.write_text(json.dumps({"scaling_factor": None, "has_whitening": True}))
    with pytest.raises(FeatureError, match="whitened"):
        load_dictionary(folder)


def test_sparsify(tmp_path: Path) -> None:
    own = random_dictionary(D, N, activation="topk", apply_b_dec_to_input=True)
    tensors = {"encoder.weight": own.W_enc.T, "encoder.bias": own.b_enc, "W_dec": own.W_dec, "b_dec": own.b_dec}
    cfg = {"d_sae": None, "dtype": None, "hook_name": None, "k": 5, "num_latents": 0, "expansion_factor": 32}

    def folder(**more: Any) -> Path:
        made = saelens(tmp_path / "layers.1", tensors, "sae.safetensors", **cfg)
        told = {key: value for key, value in {**cfg, "d_in": D, "num_latents": N, **more}.items() if value is not None}
        (made / "cfg.json").write_text(json.dumps(told))
        return made

    same(load_dictionary(folder(), hook_name=RESID), own)
    with pytest.raises(FeatureError, match="does not say where it belongs"):
        load_dictionary(folder())
    with pytest.raises(FeatureError, match="signed topk"):
        load_dictionary(folder(signed=True), hook_name=RESID)
    with pytest.raises(FeatureError, match="groupmax"):
        load_dictionary(folder(activation="groupmax"), hook_name=RESID)
    skip = replace(own, apply_b_dec_to_input=False, out_hook_name=MLP_OUT, W_skip=torch.randn(D, D))
    tensors["W_skip"] = skip.tensors["W_skip"]
    transcoder = folder(transcode=True, skip_connection=True)
    same(load_dictionary(transcoder, hook_name=RESID, out_hook_name=MLP_OUT), skip)
    with pytest.raises(FeatureError, match="does not say where it writes"):
        load_dictionary(transcoder, hook_name=RESID)


def test_a_single_file_says_what_it_is_or_is_asked(tmp_path: Path) -> None:
    own, path = random_dictionary(D, N), tmp_path / "own.safetensors"
    save_file(own.tensors, path)
    with pytest.raises(FeatureError, match="activation function"):
        load_dictionary(path, hook_name=RESID)
    with pytest.raises(FeatureError, match="give apply_b_dec_to_input"):
        load_dictionary(path, hook_name=RESID, activation="relu")
    with pytest.raises(FeatureError, match="give hook_name"):
        load_dictionary(path, activation="relu", apply_b_dec_to_input=True)
    same(load_dictionary(path, hook_name=RESID, activation="relu", apply_b_dec_to_input=False), own)
    save_file(own.tensors, path, {"hook_name": RESID, "activation": "topk", "k": "many"})
    with pytest.raises(FeatureError, match=r"a setting .* has another form"):
        load_dictionary(path)
    save_file(own.tensors, path, {"hook_name": RESID, "activation": "relu", "apply_b_dec_to_input": "yes"})
    with pytest.raises(FeatureError, match="true or false, got 'yes'"):
        load_dictionary(path)
    save_file(own.tensors, path, {"hook_name": RESID, "activation": "relu", "normalize_activations": "layer_norm"})
    with pytest.raises(FeatureError, match="normalize_activations 'layer_norm'"):
        load_dictionary(path, apply_b_dec_to_input=False)
    told = {"hook_name": RESID, "activation": "topk", "k": "5", "apply_b_dec_to_input": "true"}
    save_file(own.tensors, path, told)
    same(load_dictionary(path), replace(own, activation="topk", k=5, apply_b_dec_to_input=True))
    same(load_dictionary(path, apply_b_dec_to_input=False), replace(own, activation="topk", k=5))


@pytest.mark.parametrize(
    ("bias", "subtracts"), [("pre_bias", True), ("bias", True), ("decoder_bias", True), ("decoder.bias", None)]
)
def test_the_spelling_of_linear_layers(bias: str, subtracts: bool | None, tmp_path: Path) -> None:
    own, path = random_dictionary(D, N), tmp_path / "own.safetensors"
    linear = {"encoder.weight": own.W_enc.T, "encoder.bias": own.b_enc, "decoder.weight": own.W_dec.T, bias: own.b_dec}
    save_file({name: x.contiguous() for name, x in linear.items()}, path)
    given: dict[str, Any] = {"hook_name": RESID, "activation": "relu"}
    if subtracts is None:
        with pytest.raises(FeatureError, match="give apply_b_dec_to_input"):
            load_dictionary(path, **given)
        given["apply_b_dec_to_input"] = False
    same(load_dictionary(path, **given), replace(own, apply_b_dec_to_input=bool(subtracts)))


@pytest.mark.parametrize(
    ("tensors", "cfg", "message"),
    [
        ({"W_dec": None}, {}, "no tensor 'W_dec'"),
        ({"W_extra": torch.zeros(3)}, {}, "no place for its tensor 'W_extra'"),
        ({"scaling_factor": torch.full((N,), 2.0)}, {}, "no place for its tensor 'scaling_factor'"),
        ({"encoder.bias": torch.zeros(N)}, {}, "both 'encoder.bias' and 'b_enc'"),
        ({"b_dec": torch.zeros(D + 1)}, {}, r"b_dec is \[7\]"),
        ({"W_dec": torch.full((N, D), float("inf"))}, {}, "W_dec has numbers that are not finite"),
        ({"W_enc": torch.zeros(D, N, dtype=torch.int64)}, {"dtype": None}, "floating point"),
        ({}, {"d_sae": 11}, "says 6 inputs and 11 features"),
        ({}, {"architecture": "temporal"}, "architecture 'temporal' is not known"),
        ({}, {"architecture": "jumprelu"}, "no tensor 'threshold'"),
        ({}, {"architecture": "topk"}, "needs k"),
        ({}, {"architecture": "transcoder", "apply_b_dec_to_input": False}, "does not say where it writes"),
        ({}, {"normalize_activations": "covariance_whitening"}, "'covariance_whitening' is not known"),
        ({}, {"activation_fn": "tanh-relu"}, "'tanh-relu' is not known"),
        ({}, {"hook_head_index": 3}, "single head"),
        ({}, {"reshape_activations": "hook_q"}, "'hook_q' is not known"),
        ({}, {"hook_name": None}, "does not say where it belongs"),
        ({}, {"dtype": "float7"}, "float7"),
        ({}, {"d_in": None, "metadata": [1]}, "a setting is missing"),
        ({}, {"architecture": "topk", "k": "5"}, "k is a whole number, got '5'"),
        ({}, {"architecture": "topk", "k": 2.5}, "k is a whole number, got 2.5"),
        ({}, {"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input is true or false, got 'false'"),
        ({}, {"hook_name": ["blocks.0"]}, "the name of a hook point, got"),
        ({}, {"dtype": "float8_e4m3fn"}, "float8_e4m3fn: the tensors of a dictionary are floating point, float32"),
        ({"W_dec": torch.tensor(1.0), "b_dec": None}, {}, r"W_dec is \[\]: a matrix was expected"),
        ({"encoder.weight": torch.zeros(2, N, D), "W_enc": None}, {}, r"encoder.weight is \[2, .* a matrix"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(
    tensors: dict[str, Any], cfg: dict[str, Any], message: str, tmp_path: Path
) -> None:
    own = {name: x for name, x in {**random_dictionary(D, N).tensors, **tensors}.items() if x is not None}
    with pytest.raises(FeatureError, match=message):
        load_dictionary(saelens(tmp_path / "own", own, **cfg))


def test_pickles_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    for name in ("ae.pt", "sae.bin", "a.pkl", "b.ckpt"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(FeatureError, match="pickle"):
            load_dictionary(tmp_path / name, hook_name=RESID)
    with pytest.raises(FeatureError, match=r"none.safetensors: there is no such file"):
        load_dictionary(tmp_path / "none.safetensors")
    folder = save_dictionary(random_dictionary(D, N), tmp_path / "runs" / "final")
    with pytest.raises(FeatureError, match=r"no cfg.json.*folders inside have one: final"):
        load_dictionary(tmp_path / "runs")
    weights = folder / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for cut in (4, 60, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(FeatureError, match="damaged"):
            load_dictionary(folder)
    weights.unlink()
    with pytest.raises(FeatureError, match=r"has no sae_weights\.safetensors"):
        load_dictionary(folder)
    for text in ("{", "[1]", "{}", "[" * 100_000):
        (folder / "cfg.json").write_text(text)
        with pytest.raises(FeatureError, match=r"damaged|holds no settings|neither"):
            load_dictionary(folder)


def test_an_autoencoder_writes_where_it_reads(tmp_path: Path) -> None:
    folder = save_dictionary(random_dictionary(D, N), tmp_path / "own")
    assert load_dictionary(folder, hook_name=MLP_OUT).out_hook_name == MLP_OUT
    with pytest.raises(FeatureError, match="leave out out_hook_name"):
        load_dictionary(folder, out_hook_name=MLP_OUT)


def test_any_dictionary_is_saved_or_refused(tmp_path: Path) -> None:
    own = random_dictionary(D, N, activation="gated")
    shared = replace(own, r_mag=own.b_enc, b_mag=own.b_enc)
    same(load_dictionary(save_dictionary(shared, tmp_path / "shared")), shared)
    with pytest.raises(FeatureError, match="kept as JSON"):
        save_dictionary(replace(own, metadata={"mean": torch.zeros(2)}), tmp_path / "other")
    (tmp_path / "file").write_text("of somebody else")
    with pytest.raises(OutputError, match="cannot write"):
        save_dictionary(own, tmp_path / "file")
    one = saelens(tmp_path / "one", {**random_dictionary(D, N).tensors, "threshold": torch.full((1, 1), 0.3)})
    cfg = json.loads((one / "cfg.json").read_text())
    (one / "cfg.json").write_text(json.dumps(cfg | {"architecture": "jumprelu"}))
    assert load_dictionary(one).tensors["threshold"].tolist() == [pytest.approx(0.3)] * N


def test_saelens_names_its_tensors_so(tmp_path: Path) -> None:
    folder = save_dictionary(random_dictionary(D, N, activation="gated"), tmp_path / "own")
    names = set(load_file(folder / "sae_weights.safetensors"))
    assert names == {"W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag"}
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == "gated" and cfg["metadata"]["hook_name"] == RESID
