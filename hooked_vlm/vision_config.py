"""The configuration of a vision tower and its projector: values, whatever family they come from."""

from dataclasses import dataclass
from math import isqrt
from typing import Literal

from hooked_vlm.errors import InputError

ProjectorStep = Literal["norm", "merge", "pool", "linear", "activation"]


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its projector (sizes in elements, image sizes in pixels)."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_out: int
    """Width the projector hands to the language model."""
    act_fn: str = "quick_gelu"
    gated_mlp: bool = False
    normalization_type: str = "LN"
    eps: float = 1e-6
    pre_norm: bool = False
    """Whether the embedded patches are normalised before the first block."""
    post_norm: bool = False
    """Whether the stream is normalised behind the last block that runs."""
    unread_norm: bool = False
    """Whether the checkpoint has a norm behind its last block that nothing reads; it is kept to be saved again."""
    qkv_bias: bool = True
    qk_norm: bool = False
    """RMSNorm of queries and of keys over all heads together, before they are told apart."""
    layer_scale: bool = False
    """Whether the outputs of attention and MLP are multiplied by a learned vector (layer scale)."""
    rope_theta: float | None = 10000.0
    """Base of the rotary positions (row, column) of patches; None: patches are not rotated."""
    window: int | None = None
    """Side in patches of the square windows that attention stays in; None: patches see their whole picture."""
    full_layers: tuple[int, ...] = ()
    """Blocks whose patches see their whole picture although the others have windows."""
    n_layers_used: int | None = None
    """Blocks that run, if not all: the projector reads what leaves the last of them."""
    deepstack_layers: tuple[int, ...] = ()
    """Blocks whose patches become features of their own, which enter the language model behind its blocks 0, 1, ..."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    positions_per_second: float | None = None
    """Temporal positions that a second of video takes; None: each temporal patch takes one."""
    video_times: bool = False
    """Whether each temporal patch of a video is an image to the language model, behind its time in seconds as text."""
    in_channels: int = 3
    patch_bias: bool = False
    """Whether the patch embedding has a bias."""
    patch_order: Literal["blocks", "raster"] = "blocks"
    """Blocks: patches follow each other merge block by merge block, and pixels are flattened patches [patch, d_patch].
    Raster: row by row, and pixels are square pictures [picture, channel, height, width]."""
    class_token: bool = False
    """Whether a learned token stands before the patches of each picture."""
    n_positions: int = 0
    """Learned positions of patches, a square table (the class token's is not counted); 0: none."""
    position_fit: Literal["table", "bicubic", "bilinear"] = "table"
    """How the learned positions fit a picture. Table: its side is the table's. Bicubic and bilinear (with aligned
    corners): the table is resized to its rows and columns."""

    tile_size: int | None = None
    """Side of the square pictures that a tower of raster order takes; None: pictures have any shape."""
    processor: str = "resized"
    """What prepares pictures (`hooked_vlm.inputs.processors`): "resized" whole, as "tiles", or "cropped"."""
    transposed_tokens: bool = False
    """The tokens of a tile are numbered column by column (pixel shuffle "v1")."""
    min_tiles: int = 1
    max_tiles: int = 12
    """Bounds on the tiles of an image, its thumbnail not counted."""
    thumbnail: bool = True
    """Whether the whole image, as one more tile, follows the tiles of an image that has several."""

    pinpoints: tuple[tuple[int, int], ...] = ()
    """(height, width) in pixels, multiples of `tile_size`: a picture is fitted into the one that shows most of it."""
    max_grid: int | None = None
    """Tiles' worth of tokens above which the grid that a picture's tiles are stitched to is resampled; None: never."""

    projector: tuple[ProjectorStep, ...] = ("norm", "merge", "linear", "activation", "linear")
    """What makes image tokens of patches, in order. Norm: of patches, or behind "merge" and "pool" of tokens. Merge:
    the patches of a block side by side. Pool: the mean of a block. One linear map, or two with a GELU between them."""
    merge_size: int = 2
    """Merge: patches of a `merge_size` x `merge_size` block become one image token."""
    pool_size: int = 1
    """Pool: the same of its blocks."""
    d_projector: int | None = None
    """Width between two linear maps; None: that of their input."""
    projector_norm_type: Literal["LN", "RMS"] = "LN"
    projector_norm_offset: bool = False
    """Whether the projector's RMSNorm multiplies by 1 + weight, in float32."""
    projector_eps: float = 1e-6
    projector_bias: bool = True
    line_break: bool = False
    """Whether a learned vector stands behind rows of image tokens, where their layout says so."""

    def __post_init__(self) -> None:
        _check_projector(self)
        _check_patches(self)
        for name in ("full_layers", "deepstack_layers"):
            blocks = getattr(self, name)
            if list(blocks) != sorted({block for block in blocks if 0 <= block < self.n_layers_run}):
                last = self.n_layers_run - 1
                raise InputError(f"{name} must be different blocks that run, 0 to {last}, in order, got {blocks}")
        _check_windows(self)

    @property
    def layer_kind_of(self) -> tuple[int, ...]:
        """Kind of each block: 0 sees whole images, 1 windows; empty where none has windows."""
        if self.window is None:
            return ()
        return tuple(int(layer not in self.full_layers) for layer in range(self.n_layers))

    @property
    def n_layers_run(self) -> int:
        return self.n_layers if self.n_layers_used is None else self.n_layers_used

    @property
    def norm_of(self) -> Literal["patches", "tokens"] | None:
        """What the projector's norm sees: patches before they become tokens, or tokens; None without a norm."""
        if "norm" not in self.projector:
            return None
        makes_tokens = [step for step in self.projector if step in ("norm", "merge", "pool")]
        return "tokens" if makes_tokens[-1] == "norm" else "patches"

    @property
    def token_size(self) -> int:
        """Side in patches of the square that one image token covers."""
        return self.merge_size * self.pool_size

    @property
    def d_merged(self) -> int:
        """Width of the patches of a merge block side by side: what the projector's first linear map reads."""
        return self.d_model * self.merge_size**2

    @property
    def d_patch(self) -> int:
        """Numbers in one flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of (resized) pixels that one image token covers."""
        return self.patch_size * self.token_size


def _check_projector(cfg: VisionConfig) -> None:
    """Refuse steps that make no projector.

    Raises:
        InputError: names the step that is too many, lacks or stands in the wrong place.
    """
    steps = cfg.projector
    first = steps.index("linear") if "linear" in steps else len(steps)
    before, maps = steps[:first], steps[first:]
    if maps not in (("linear",), ("linear", "activation", "linear")):
        raise InputError(f'projector must end in one "linear", or in "linear", "activation", "linear", got {steps}')
    if not set(before) <= {"norm", "merge", "pool"} or len(set(before)) < len(before):
        raise InputError(f'projector begins with "norm", "merge" and "pool", each at most once, got {steps}')
    if {"merge", "pool"} <= set(before):
        raise InputError(f'projector makes tokens by "merge" or by "pool", not by both, got {steps}')
    for step, name, size in (("merge", "merge_size", cfg.merge_size), ("pool", "pool_size", cfg.pool_size)):
        if size < 1 or (size > 1 and step not in before):
            raise InputError(f'{name} must be 1 in a projector without "{step}" and at least 1 in others, got {size}')
    if cfg.d_projector is not None and len(maps) == 1:
        raise InputError(f"d_projector is the width between two linear maps, got {cfg.d_projector} for {steps}")


def _check_windows(cfg: VisionConfig) -> None:
    """Refuse windows that cut tokens, or stand where pictures have one size.

    Raises:
        InputError: names the field.
    """
    if cfg.window is None:
        if cfg.full_layers:
            raise InputError(f"full_layers {cfg.full_layers} are for a tower with windows, but window is None")
        return
    if cfg.patch_order == "raster":
        raise InputError('windows need patch_order="blocks", got "raster": window must be None')
    if cfg.window < 1 or cfg.window % cfg.merge_size:
        raise InputError(f"window must be a multiple of merge_size ({cfg.merge_size}), got {cfg.window} patches")


def _check_patches(cfg: VisionConfig) -> None:
    """Refuse an order of patches, or positions, that pictures do not have.

    Raises:
        InputError: names the fields that do not fit each other.
    """
    raster = cfg.patch_order == "raster"
    if raster != (cfg.tile_size is not None):
        expected = "the side of its square pictures" if raster else "None (its pictures have any shape)"
        raise InputError(f'tile_size with patch_order="{cfg.patch_order}" must be {expected}, got {cfg.tile_size}')
    if raster and cfg.temporal_patch_size != 1:
        raise InputError(f"pictures in raster order have temporal_patch_size=1, got {cfg.temporal_patch_size}")
    if "pool" in cfg.projector and not raster:
        raise InputError(f'"pool" needs patch_order="raster", got "{cfg.patch_order}"')
    if cfg.rope_theta is not None and (raster or cfg.class_token):
        raise InputError(
            'rotary positions are those of patches in patch_order="blocks" without a class token: set rope_theta=None, '
            f'got {cfg.rope_theta} with patch_order="{cfg.patch_order}" and class_token={cfg.class_token}'
        )
    side = isqrt(cfg.n_positions)
    if side**2 != cfg.n_positions:
        raise InputError(f"n_positions must be the number of places of a square table, got {cfg.n_positions}")
    if cfg.tile_size is None:
        if cfg.n_positions and cfg.position_fit == "table":
            raise InputError('pictures of any shape need position_fit="bicubic" or "bilinear", got "table"')
        return
    if any(side < 1 or side % cfg.tile_size for pinpoint in cfg.pinpoints for side in pinpoint):
        raise InputError(f"pinpoints must be multiples of tile_size ({cfg.tile_size} pixels), got {cfg.pinpoints}")
    patches = cfg.tile_size // cfg.patch_size
    if patches % cfg.token_size:
        raise InputError(
            f"a picture of tile_size={cfg.tile_size} has {patches} rows of patches, which must be a multiple of the "
            f"{cfg.token_size} of a token"
        )
    if cfg.n_positions and cfg.position_fit == "table" and side != patches:
        raise InputError(
            f'position_fit="table" needs a position for each patch, {patches} x {patches}, got n_positions='
            f'{cfg.n_positions}: give "bicubic" or "bilinear" to resize them'
        )
