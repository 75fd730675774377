"""Dictionaries of features: sparse autoencoders and transcoders as tensors, with the formulas of SAELens 6."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.errors import FeatureError
from hooked_vlm.model.hook_catalogue import HookRow, hook_table, without_layer
from hooked_vlm.model.hook_shapes import filled
from hooked_vlm.nn.hooks import canonical, is_quadratic

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Activation = Literal["relu", "topk", "jumprelu", "gated"]
Normalisation = Literal["none", "layer_norm", "constant_norm_rescale"]

NEEDS: dict[str, tuple[str, ...]] = {
    "relu": (), "topk": ("k",), "jumprelu": ("threshold",), "gated": ("r_mag", "b_mag"),
}  # fmt: skip
"""Fields that an activation function has of its own; those of another one are refused."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPS = 1e-5
"""Added to the standard deviation by `layer_norm` (SAELens 6, saes/sae.py)."""


@runtime_checkable
class FeatureDictionary(Protocol):
    """Reads features of a stream at one hook point, and writes what they stand for at the same or a later one."""

    @property
    def hook_name(self) -> str:
        """Hook point that is read."""
        ...

    @property
    def out_hook_name(self) -> str:
        """Hook point that is reconstructed: the same for an autoencoder, another for a transcoder."""
        ...

    @property
    def d_in(self) -> int: ...

    @property
    def d_out(self) -> int: ...

    @property
    def n_features(self) -> int: ...

    def encode(self, x: Float[Tensor, "*at d_in"]) -> Float[Tensor, "*at feature"]:
        """Activations of the features."""
        ...

    def decode(
        self, features: Float[Tensor, "*at feature"], x: Float[Tensor, "*at d_in"] | None = None
    ) -> Float[Tensor, "*at d_out"]:
        """Reconstruction, in the units of the stream.

        Args:
            x: what the features were read from, for a dictionary whose reconstruction depends on it.
        """
        ...


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse autoencoder or transcoder.

        z = normalised(x) - b_dec        (minus b_dec only with `apply_b_dec_to_input`)
        f = activation(z W_enc + b_enc)
        reconstruction = f W_dec + b_dec, back in the units of x, plus x W_skip^T if there is one

    It computes in the dtype and on the device of its tensors. Gradients reach x and the features.

    A constant factor in front of the input (SAELens' `expected_average_only_in`) is no field: `rescaled` puts it into
    the weights.

    Raises:
        FeatureError: shapes that do not fit each other, numbers that are not finite, a field that the activation
            function needs or does not have.
    """

    hook_name: str
    """Hook point that is read."""
    W_enc: Tensor
    """[d_in, feature]; shapes are checked on construction, with a message."""
    b_enc: Tensor
    """[feature]; for a gated dictionary the bias of the gate."""
    W_dec: Tensor
    """[feature, d_out]"""
    b_dec: Tensor
    """[d_out]"""
    out_hook_name: str = ""
    """Hook point that is reconstructed; `hook_name` if left out, another one for a transcoder."""
    activation: Activation = "relu"
    k: int | None = None
    """Features that `topk` keeps, of which negative ones become 0."""
    threshold: Tensor | None = None
    """[feature]; `jumprelu` keeps what lies above it."""
    r_mag: Tensor | None = None
    """[feature]; logarithm of the factor between the encoder of the magnitude and that of the gate."""
    b_mag: Tensor | None = None
    """[feature]; bias of the magnitude."""
    apply_b_dec_to_input: bool = False
    normalisation: Normalisation = "none"
    """Of each input vector: to mean 0 and standard deviation 1, or to norm sqrt(d_in). An autoencoder's reconstruction
    gets mean and scale back; a transcoder's output has units of its own."""
    W_skip: Tensor | None = None
    """[d_out, d_in]; linear path of a skip transcoder past its features."""
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Where it comes from, as JSON: kept in files, read by nothing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out_hook_name", self.out_hook_name or self.hook_name)
        if not self.hook_name:
            raise FeatureError("a dictionary belongs to a hook point: give hook_name, e.g. 'blocks.8.hook_resid_post'")
        for name, allowed in (("activation", get_args(Activation)), ("normalisation", get_args(Normalisation))):
            if getattr(self, name) not in allowed:
                raise FeatureError(f"{name} is one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self._check_fields()
        self._check_shapes()
        for name, x in self.tensors.items():
            if x.dtype not in FLOATS:
                allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
                raise FeatureError(
                    f"{name} holds {_dtype(x)}: the tensors of a dictionary are floating point, {allowed}"
                )
            if x.dtype != self.W_enc.dtype or x.device != self.W_enc.device:
                raise FeatureError(
                    f"{name} is {_dtype(x)} on {x.device}, W_enc {_dtype(self.W_enc)} on {self.W_enc.device}: "
                    "bring them to one dtype and device"
                )
            if not bool(torch.isfinite(x).all()):
                raise FeatureError(f"{name} has numbers that are not finite")

    def _check_fields(self) -> None:
        needed = NEEDS[self.activation]
        for name in ("k", "threshold", "r_mag", "b_mag"):
            if (getattr(self, name) is not None) != (name in needed):
                verb = "needs" if name in needed else "has no"
                raise FeatureError(f"a dictionary with activation {self.activation!r} {verb} {name}")
        if self.k is not None and not 1 <= self.k <= self.n_features:
            raise FeatureError(f"k is between 1 and the number of features, {self.n_features}, got {self.k}")
        if self.apply_b_dec_to_input and self.is_transcoder:
            raise FeatureError("b_dec of a transcoder belongs to its output: apply_b_dec_to_input must be False")
        if self.W_skip is not None and not self.is_transcoder:
            raise FeatureError("a skip path belongs to a transcoder: give the out_hook_name that it writes")

    def _check_shapes(self) -> None:
        if self.W_enc.ndim != 2 or self.W_dec.ndim != 2:
            shapes = f"{list(self.W_enc.shape)} and {list(self.W_dec.shape)}"
            raise FeatureError(f"W_enc is [d_in, feature] and W_dec [feature, d_out], got {shapes}")
        d_in, n, d_out = self.d_in, self.n_features, self.d_out
        if 0 in (d_in, n, d_out):
            raise FeatureError(f"a dictionary has inputs, features and outputs, got {d_in}, {n} and {d_out} of them")
        expected = {"W_dec": (n, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
        for name, x in self.tensors.items():
            if name != "W_enc" and tuple(x.shape) != (shape := expected.get(name, (n,))):
                raise FeatureError(
                    f"{name} is {list(x.shape)}, but W_enc [{d_in}, {n}] and W_dec [{n}, {d_out}] need {list(shape)}"
                )
        if not self.is_transcoder and d_in != d_out:
            raise FeatureError(
                f"W_enc reads {d_in} numbers and W_dec writes {d_out}: an autoencoder writes what it reads; give a "
                "transcoder its out_hook_name"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by field."""
        return {own.name: x for own in fields(self) if isinstance(x := getattr(self, own.name), Tensor)}

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def n_features(self) -> int:
        return self.W_enc.shape[1]

    @property
    def is_transcoder(self) -> bool:
        """Whether it reconstructs another hook point than it reads."""
        return self.out_hook_name != self.hook_name

    @property
    def decode_needs_input(self) -> bool:
        """Whether a reconstruction depends on the input past its features: its norm, or a skip path."""
        return self.W_skip is not None or (self.normalisation != "none" and not self.is_transcoder)

    def encode(self, x: Float[Tensor, "*at d_in"]) -> Float[Tensor, "*at feature"]:
        """Activations of the features."""
        z = self._normalised(x.to(self.W_enc))
        if self.apply_b_dec_to_input:
            z = z - self.b_dec
        pre = z @ self.W_enc + self.b_enc
        if self.k is not None:
            top = torch.topk(pre, self.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        if self.threshold is not None:
            return pre.relu() * (pre > self.threshold)
        if self.r_mag is not None and self.b_mag is not None:
            magnitude = z @ (self.W_enc * self.r_mag.exp()) + self.b_mag
            return (pre > 0) * magnitude.relu()
        return pre.relu()

    def decode(
        self, features: Float[Tensor, "*at feature"], x: Float[Tensor, "*at d_in"] | None = None
    ) -> Float[Tensor, "*at d_out"]:
        """Reconstruction, in the units of the stream.

        Args:
            x: what the features were read from; needed with a normalisation or a skip path.

        Raises:
            FeatureError: x is needed and missing.
        """
        out = features.to(self.W_dec) @ self.W_dec + self.b_dec
        if not self.decode_needs_input:
            return out
        if x is None:
            why = "a skip path" if self.W_skip is not None else f"normalisation {self.normalisation!r}"
            raise FeatureError(f"a dictionary with {why} needs its input to decode: decode(features, x)")
        x = x.to(self.W_dec)
        return self._in_units_of(x, out) if self.W_skip is None else out + x @ self.W_skip.T

    def _normalised(self, x: Float[Tensor, "*at d_in"]) -> Float[Tensor, "*at d_in"]:
        if self.normalisation == "layer_norm":
            return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS)
        return x / _rms(x) if self.normalisation == "constant_norm_rescale" else x

    def _in_units_of(self, x: Float[Tensor, "*at d_in"], out: Float[Tensor, "*at d_in"]) -> Float[Tensor, "*at d_in"]:
        """Undo the normalisation of x."""
        if self.normalisation == "layer_norm":
            return out * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
        return out * _rms(x) if self.normalisation == "constant_norm_rescale" else out

    def to(self, *args: Any, **kwargs: Any) -> "Dictionary":
        """The same dictionary on another device or in another dtype; arguments are those of `Tensor.to`."""
        return replace(self, **{name: x.to(*args, **kwargs) for name, x in self.tensors.items()})

    def rescaled(self, scale: float) -> "Dictionary":
        """The dictionary that does to x what this one does to `scale` times x, in the units of x."""
        if not (scale > 0 and math.isfinite(scale)):
            raise FeatureError(f"a scale is a positive number, got {scale}")
        if self.normalisation != "none":
            raise FeatureError(f"a constant scale changes nothing before normalisation {self.normalisation!r}")
        return replace(self, W_enc=self.W_enc * scale, W_dec=self.W_dec / scale, b_dec=self.b_dec / scale)

    def check_fits(self, model: "HookedVLM") -> None:
        """Refuse a model that it does not fit (`check_fits`)."""
        check_fits(self, model)


def check_fits(dictionary: FeatureDictionary, model: "HookedVLM") -> None:
    """Refuse a model without the hook points of a dictionary, or with other widths there.

    Raises:
        HookError: there is no such hook point (the nearest names are given), or it is switched off.
        FeatureError: another width, or one hook point within the vision tower and one outside.
    """
    read, written = dictionary.hook_name, dictionary.out_hook_name
    for name, width, verb in ((read, dictionary.d_in, "reads"), (written, dictionary.d_out, "writes")):
        if width != (here := width_at(model, name)):
            raise FeatureError(
                f"the dictionary {verb} {width} numbers at {name!r}, but {model.cfg.model_name} has {here} there"
            )
    if row_of(model, read).shape[:2] != row_of(model, written).shape[:2]:
        raise FeatureError(f"{read!r} and {written!r} belong to different positions: a transcoder stays at each")


def check_places(dictionaries: Mapping[str, FeatureDictionary], model: "HookedVLM") -> None:
    """Check that dictionaries are named by the hook points that they read, and fit the model (`check_fits`)."""
    for name, dictionary in dictionaries.items():
        if name != dictionary.hook_name:
            raise FeatureError(f"the dictionary given for {name!r} reads {dictionary.hook_name!r}")
        check_fits(dictionary, model)


def width_at(model: "HookedVLM", name: str) -> int:
    """Numbers of a hook point's tensor at one position, all heads together.

    Raises:
        HookError: there is no such hook point, or it is switched off.
        FeatureError: scores and patterns have none.
    """
    model.check_hook_name(name)
    if is_quadratic(name):
        raise FeatureError(f"{name!r} holds pairs of positions, no vector at each: features cannot be read there")
    return math.prod(size for size in filled(row_of(model, name), model.cfg) if isinstance(size, int))


def row_of(model: "HookedVLM", name: str) -> HookRow:
    """Row of the hook table that describes a hook point."""
    own = without_layer(canonical(name, model.hook_dict))
    return next(row for row in hook_table(model) if row.name == own)


def _rms(x: Float[Tensor, "*at d"]) -> Float[Tensor, "*at 1"]:
    """Root mean square; vectors of zeros, which padding is, stay zeros when divided by it."""
    return x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / math.sqrt(x.shape[-1])


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
