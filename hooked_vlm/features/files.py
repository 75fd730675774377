"""Dictionaries in files: the folders of SAELens and sparsify, and single safetensors files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_vlm.errors import FeatureError
from hooked_vlm.features.dictionary import NEEDS, Activation, Dictionary, Normalisation
from hooked_vlm.runtime.files import atomic_write, why, writable_folder

CONFIG, WEIGHTS, SPARSIFY_WEIGHTS = "cfg.json", "sae_weights.safetensors", "sae.safetensors"
SCALER = "activation_scaler.json"
"""Where SAELens keeps the factor before the input of an unfinished run, which finished ones have in their weights."""
SAELENS_VERSION = "6.0.0"
"""Of the layout that is written."""
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


class _Kind(NamedTuple):
    activation: Activation
    transcoder: bool = False
    skip: bool = False


ARCHITECTURES = {
    "standard": _Kind("relu"),
    "topk": _Kind("topk"),
    "jumprelu": _Kind("jumprelu"),
    "gated": _Kind("gated"),
    "transcoder": _Kind("relu", True),
    "skip_transcoder": _Kind("relu", True, True),
    "jumprelu_transcoder": _Kind("jumprelu", True),
    "jumprelu_skip_transcoder": _Kind("jumprelu", True, True),
    # SAELens has none of these four: they are read and written here alone
    "topk_transcoder": _Kind("topk", True),
    "topk_skip_transcoder": _Kind("topk", True, True),
    "gated_transcoder": _Kind("gated", True),
    "gated_skip_transcoder": _Kind("gated", True, True),
    # trained on the largest activations of a batch, used with the threshold that was learned on the way
    "batchtopk": _Kind("jumprelu"),
    "matryoshka_batchtopk": _Kind("jumprelu"),
}
"""Architectures by SAELens' names; of those alike the first one is written."""
NAMES = {kind: name for name, kind in reversed(ARCHITECTURES.items())}

SPELLINGS = {
    "encoder.bias": "b_enc", "latent_bias": "b_enc", "decoder.bias": "b_dec", "pre_bias": "b_dec", "bias": "b_dec",
    "decoder_bias": "b_dec", "b_gate": "b_enc", "gate_bias": "b_enc", "mag_bias": "b_mag",
    "topk_threshold": "threshold",
}  # fmt: skip
"""Other names of tensors, `nn.Linear`'s weights apart, which are also transposed."""
LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "r_mag", "b_mag", "W_skip")
TYPES: dict[str, tuple[type, str]] = {
    "hook_name": (str, "the name of a hook point"), "out_hook_name": (str, "the name of a hook point"),
    "k": (int, "a whole number"), "apply_b_dec_to_input": (bool, "true or false"),
}  # fmt: skip
DESCRIBING = ("model_name", "dataset_path", "context_size", "prepend_bos", "sae_lens_version")
"""Keys of configurations before SAELens 6 that are kept as metadata."""


def load_dictionary(
    path: str | Path,
    *,
    hook_name: str | None = None,
    out_hook_name: str | None = None,
    activation: Activation | None = None,
    k: int | None = None,
    apply_b_dec_to_input: bool | None = None,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> Dictionary:
    """Read a dictionary, on the CPU; nothing is unpickled.

    Folders of SAELens (`cfg.json` beside `sae_weights.safetensors`, versions 3 to 6) and of sparsify (`cfg.json` beside
    `sae.safetensors`) say what they are. A single safetensors file may do so in its metadata; what neither the file
    nor the caller says, and would change the numbers, is asked for.

    Args:
        hook_name, out_hook_name: in place of what the files say, e.g. where they name a module of another library.
        activation, k, apply_b_dec_to_input: of a single file that does not say so.
        scale: factor before the input, for a dictionary trained on such streams (`expected_average_only_in`) whose
            files do not have it.
        dtype: that of the configuration, or of the tensors, by default.

    Raises:
        FeatureError: no such file, a damaged one, a pickle, an architecture or normalisation that is not known, tensors
            that are missing, left over or do not fit, settings that nobody says.
    """
    path = Path(path)
    given = {
        "hook_name": hook_name, "out_hook_name": out_hook_name, "activation": activation, "k": k,
        "apply_b_dec_to_input": apply_b_dec_to_input,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    settings, tensors = _read_folder(path) if path.is_dir() else _within(path, lambda: _read_single(path, given))
    settings |= given
    _within(path, lambda: _check_types(settings))
    if not settings.get("hook_name"):
        raise FeatureError(f"{path} does not say where it belongs: give hook_name, e.g. 'blocks.8.hook_resid_post'")
    _check_kind(path, settings.pop("transcoder"), settings["hook_name"], settings.get("out_hook_name"))
    dtype = dtype or settings.pop("dtype", None) or tensors["W_enc"].dtype
    settings.pop("dtype", None)
    scale = settings.pop("scale", None) if scale is None else scale
    if settings.pop("scaled", False) and scale is None:
        raise FeatureError(
            f"{path} was trained on streams times a constant (expected_average_only_in) that no file in it has: give "
            "scale, or 1.0 if the weights contain it"
        )

    def made() -> Dictionary:
        found = Dictionary(**{name: x.to(dtype) for name, x in tensors.items()}, **settings)
        return found if scale is None else found.rescaled(scale)

    return _within(path, made)


def save_dictionary(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a folder in the layout of SAELens 6, which reads it if it has the architecture.

    Raises:
        OutputError: it cannot be written; a folder without `cfg.json`, which stands for a whole one, is left at most.
        FeatureError: metadata that is no JSON.
    """
    path = writable_folder(Path(path))
    tensors = {  # copies: a file holds no two tensors of the same memory
        name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in dictionary.tensors.items()
    }
    if dictionary.activation == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    kind = _Kind(dictionary.activation, dictionary.is_transcoder, dictionary.W_skip is not None)
    cfg = {
        "architecture": NAMES[kind],
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_features,
        **({"d_out": dictionary.d_out} if kind.transcoder else {}),
        **({"k": dictionary.k} if dictionary.k is not None else {}),
        "dtype": str(dictionary.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.apply_b_dec_to_input,
        "normalize_activations": dictionary.normalisation,
        "reshape_activations": "hook_z" if dictionary.hook_name.endswith("hook_z") else "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            **dictionary.metadata,
            "hook_name": dictionary.hook_name,
            **({"hook_name_out": dictionary.out_hook_name} if kind.transcoder else {}),
        },
    }
    try:
        text = json.dumps(cfg, indent=1)
    except (TypeError, ValueError) as error:
        raise FeatureError(f"metadata of a dictionary is kept as JSON: {why(error)}") from error
    for own in (CONFIG, SCALER):  # never beside weights of another dictionary
        (path / own).unlink(missing_ok=True)
    atomic_write(path / WEIGHTS, lambda aside: save_file(tensors, aside))
    atomic_write(path / CONFIG, lambda aside: aside.write_text(text, encoding="utf-8"))
    return path


def _check_kind(path: Path, transcoder: bool, hook_name: str, out_hook_name: str | None) -> None:
    """Refuse a transcoder that nobody says the output of, and an autoencoder with one."""
    writes_elsewhere = bool(out_hook_name) and out_hook_name != hook_name
    if transcoder and not writes_elsewhere:
        raise FeatureError(f"{path} is a transcoder and does not say where it writes: give out_hook_name")
    if writes_elsewhere and not transcoder:
        raise FeatureError(f"{path} is an autoencoder, which writes where it reads: leave out out_hook_name")


def _check_types(settings: Mapping[str, Any]) -> None:
    """Refuse what JSON has as another type, e.g. the text "false", which counts as true."""
    for name, (kind, words) in TYPES.items():
        value = settings.get(name)
        if not (isinstance(value, kind) or value is None) or (kind is int and isinstance(value, bool)):
            raise FeatureError(f"{name} is {words}, got {value!r}")


# ---------------------------------------------------------------- reading


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings, as fields of `Dictionary` with `dtype`, `scale` and `scaled`, and tensors."""
    if not (folder / CONFIG).is_file():
        inside = sorted(str(found.parent.relative_to(folder)) for found in folder.glob(f"*/**/{CONFIG}"))
        hint = f"; folders inside have one: {', '.join(inside[:3])}" if inside else ""
        raise FeatureError(f"{folder} has no {CONFIG}: give the folder of one dictionary, or a safetensors file{hint}")
    cfg = _read_json(folder / CONFIG)
    if "d_sae" in cfg:
        read, name = _saelens, WEIGHTS
    elif "num_latents" in cfg or "expansion_factor" in cfg:
        read, name = _sparsify, SPARSIFY_WEIGHTS
    else:
        raise FeatureError(f"{folder / CONFIG} is neither SAELens' (no d_sae) nor sparsify's (no num_latents)")
    if not (folder / name).is_file():
        raise FeatureError(f"{folder} has no {name}, whose weights {CONFIG} describes")
    tensors, _ = _within(folder / name, lambda: _read_tensors(folder / name))
    settings = _within(folder, lambda: read(cfg, tensors))
    if (folder / SCALER).is_file():
        scaler = _read_json(folder / SCALER)
        if scaler.get("has_whitening"):
            raise FeatureError(f"{folder} belongs to whitened streams, which are not supported")
        settings["scale"] = scaler.get("scaling_factor")
    return settings, tensors


def _saelens(cfg: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Settings of SAELens' configuration, of version 6 or older (its `handle_pre_6_0_config`)."""
    metadata = dict(cfg.get("metadata") or {key: cfg[key] for key in DESCRIBING if key in cfg})
    said = {**cfg, **metadata}
    name, function = cfg.get("architecture") or "standard", cfg.get("activation_fn") or cfg.get("activation_fn_str")
    if name == "standard" and function == "topk":
        name = "topk"
    elif function not in (None, "relu") and name not in ("topk", "batchtopk", "matryoshka_batchtopk"):
        raise FeatureError(f"activation function {function!r} is not known: relu and topk are")
    if name not in ARCHITECTURES:
        raise FeatureError(f"architecture {name!r} is not known: {', '.join(ARCHITECTURES)} are")
    kind = ARCHITECTURES[name]
    if said.get("hook_head_index") is not None or said.get("hook_head_index_out") is not None:
        raise FeatureError("it belongs to a single head, which is not supported")
    if (reshaped := cfg.get("reshape_activations", "none")) not in ("none", "hook_z"):
        raise FeatureError(f"reshape_activations {reshaped!r} is not known: none and hook_z are")
    normalisation = cfg.get("normalize_activations") or "none"
    scaled = normalisation in (True, "expected_average_only_in")
    if not scaled and normalisation not in (known := get_args(Normalisation)):
        raise FeatureError(f"normalisation {normalisation!r} is not known: {', '.join(known)} are")
    k = cfg.get("k") or (cfg.get("activation_fn_kwargs") or {}).get("k")
    out_hook = said.get("hook_name_out") or said.get("hook_point_out") if kind.transcoder else None
    _rename(tensors, kind)
    _check_sizes(tensors, cfg["d_in"], cfg["d_sae"])
    if cfg.get("rescale_acts_by_decoder_norm"):
        _fold_decoder_norm(tensors)
    return {
        "hook_name": said.get("hook_name") or said.get("hook_point"),
        "out_hook_name": out_hook or "",
        "transcoder": kind.transcoder,
        "activation": kind.activation,
        "k": k if kind.activation == "topk" else None,
        "apply_b_dec_to_input": cfg.get("apply_b_dec_to_input", not kind.transcoder),
        "normalisation": "none" if scaled else normalisation,
        "metadata": {key: x for key, x in metadata.items() if key not in ("hook_name", "hook_name_out")},
        "dtype": _dtype(cfg.get("dtype")),
        "scaled": scaled,
    }


def _sparsify(cfg: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Settings of sparsify's configuration. It subtracts b_dec from the input, except in transcoders."""
    if (function := cfg.get("activation", "topk")) != "topk" or cfg.get("signed"):
        raise FeatureError(f"activation {'signed topk' if cfg.get('signed') else function!r} of sparsify is not known")
    kind = _Kind("topk", bool(cfg.get("transcode")), bool(cfg.get("skip_connection")))
    _rename(tensors, kind)
    _check_sizes(tensors, cfg["d_in"], cfg.get("num_latents") or cfg["d_in"] * cfg["expansion_factor"])
    own = {"activation": "topk", "k": cfg["k"], "transcoder": kind.transcoder}
    return {**own, "apply_b_dec_to_input": not kind.transcoder}


def _read_single(path: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a single file; what it leaves open and would change the numbers must be given."""
    tensors, header = _read_tensors(path)
    settings: dict[str, Any] = {
        key: header[key] for key in ("hook_name", "out_hook_name", "activation") if key in header
    }
    if "k" in header:
        settings["k"] = int(header["k"])
    if "apply_b_dec_to_input" in header:
        word = header["apply_b_dec_to_input"].lower()
        settings["apply_b_dec_to_input"] = {"true": True, "false": False}.get(word, word)  # others are refused
    for name in ("normalisation", "normalize_activations"):
        if header.get(name, "none").lower() != "none":
            raise FeatureError(f"its metadata has {name} {header[name]!r}: only folders may have one")
    said = {**settings, **given}
    known = [name for name in ("jumprelu", "gated") if any(need in tensors for need in NEEDS[name])]
    activation: Any = said.get("activation") or (known[0] if len(known) == 1 else "topk" if "k" in said else None)
    if activation not in NEEDS:
        raise FeatureError(f"it does not say its activation function: give activation ({', '.join(NEEDS)})")
    subtracts = any(name in tensors for name in ("pre_bias", "bias", "decoder_bias"))
    transcoder = bool(said.get("out_hook_name")) and said["out_hook_name"] != said.get("hook_name")
    kind = _Kind(activation, transcoder, "W_skip" in tensors)
    _rename(tensors, kind)
    settings |= {"activation": activation, "transcoder": transcoder}
    if "apply_b_dec_to_input" not in said:
        if not (subtracts or transcoder) and bool(tensors["b_dec"].any()):
            raise FeatureError("it does not say if b_dec is subtracted from the input: give apply_b_dec_to_input")
        settings["apply_b_dec_to_input"] = subtracts and not transcoder
    return settings, tensors


def _rename(tensors: dict[str, Tensor], kind: _Kind) -> None:
    """Bring tensors to the names and orientation of `Dictionary`, in place.

    Raises:
        FeatureError: some are missing, there twice, or have no place.
    """
    for name in ("scaling_factor", "finetuning_scaling_factor"):  # SAELens before 4 wrote ones
        if name in tensors and bool((tensors[name] == 1).all()):
            del tensors[name]
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    for name in (*LINEAR, *LINEAR.values()):
        if name in tensors and tensors[name].ndim != 2:
            raise FeatureError(f"{name} is {list(tensors[name].shape)}: a matrix was expected")
    for old, new in (*SPELLINGS.items(), *LINEAR.items()):
        if old in tensors:
            if new in tensors:
                raise FeatureError(f"it has both {old!r} and {new!r}, which are the same tensor")
            tensors[new] = tensors.pop(old).T if old in LINEAR else tensors.pop(old)
    needed = ["W_enc", "W_dec", *(name for name in NEEDS[kind.activation] if name != "k")]
    needed += ["W_skip"] if kind.skip else []
    if missing := [name for name in needed if name not in tensors]:
        raise FeatureError(f"it has no tensor {missing[0]!r} (it has {', '.join(sorted(tensors))})")
    allowed = {*needed, "b_enc", "b_dec"}
    if left_over := sorted(set(tensors) - allowed):
        raise FeatureError(
            f"there is no place for its tensor {left_over[0]!r} in a dictionary with {kind.activation!r}"
        )
    tensors.setdefault("b_enc", tensors["W_enc"].new_zeros(tensors["W_enc"].shape[-1]))
    tensors.setdefault("b_dec", tensors["W_dec"].new_zeros(tensors["W_dec"].shape[-1]))
    if "threshold" in tensors and tensors["threshold"].numel() == 1:
        tensors["threshold"] = tensors["threshold"].view(1).expand_as(tensors["b_enc"]).clone()


def _fold_decoder_norm(tensors: dict[str, Tensor]) -> None:
    """Bring the decoder to unit norm, in place: SAELens' `rescale_acts_by_decoder_norm` multiplies what is encoded by
    the norm and divides what is decoded."""
    norm = tensors["W_dec"].norm(dim=-1).clamp_min(1e-8)
    for name in ("W_enc", "b_enc"):
        tensors[name] = tensors[name] * norm
    tensors["W_dec"] = tensors["W_dec"] / norm[:, None]


def _check_sizes(tensors: Mapping[str, Tensor], d_in: int, n_features: int) -> None:
    if tuple(tensors["W_enc"].shape) != (d_in, n_features):
        raise FeatureError(
            f"{CONFIG} says {d_in} inputs and {n_features} features, but W_enc is {list(tensors['W_enc'].shape)}"
        )


def _within(path: Path, read: Callable[[], Any]) -> Any:
    """Name the file in what is said of its content."""
    try:
        return read()
    except FeatureError as error:
        raise FeatureError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FeatureError(f"{path}: a setting is missing or has another form: {why(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FeatureError(f"{path} is damaged: {why(error)}") from error
    if not isinstance(found, dict):
        raise FeatureError(f"{path} holds no settings: expected an object, got a {type(found).__name__}")
    return found


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    if path.suffix.lower() in PICKLES:
        raise FeatureError("it may be a pickle, which can run code: convert it to safetensors where it was made")
    if not path.is_file():
        raise FeatureError("there is no such file")
    try:
        with safe_open(path, "pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FeatureError(f"it is damaged, or no safetensors file: {why(error)}") from error


def _dtype(name: str | None) -> torch.dtype | None:
    """The dtype that a configuration names; None if it names none."""
    if name is None:
        return None
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise FeatureError(f"dtype {name!r} is not known")
    return found
