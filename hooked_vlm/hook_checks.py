"""A hook that cannot act must say so: unknown names, switched-off points, points that a run never passes."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hooked_vlm.config import VLMConfig
from hooked_vlm.hooks import HookError, HookName, HookPoint, canonical, is_encoder, is_vision, nearest_names
from hooked_vlm.inputs import VLMInputs

_SWITCHES = (
    (("hook_result",), "use_attn_result"),
    (("hook_q_input", "hook_k_input", "hook_v_input"), "use_split_qkv_input"),
    (("hook_attn_in",), "use_attn_in"),
    (("hook_mlp_in",), "use_hook_mlp_in"),
)


class HookChecksMixin(nn.Module):
    """What a `HookedVLM` asks of a hook before it is set."""

    cfg: VLMConfig
    hook_dict: dict[str, Any]

    def check_hook_name(self, name: HookName) -> None:
        """Refuse a hook that could not act in any run.

        Raises:
            HookError: no hook point has this name (or none passes this filter), it is switched off, or another module
                stands in its place; neither a name nor a filter.
        """
        self.points_of(name)

    def points_of(self, name: HookName) -> list[HookPoint]:
        """The hook points that a name or filter means.

        Raises:
            HookError: as `check_hook_name`.
        """
        if not isinstance(name, str) and not callable(name):
            raise HookError(f"a hook point is given by its name or by a filter of names, got {name!r}")
        matches = self._matches(name)
        if not matches and not isinstance(name, str):
            raise HookError("this hook filter matches none of the model's hook points (see model.hook_dict)")
        if not matches:
            raise HookError(f"there is no hook point {name!r}.{nearest_names(str(name), self.hook_dict)}")
        reasons = [self._switched_off(n) for n in matches]
        if all(reasons):
            raise HookError(f"{matches[0]!r} {reasons[0]}")
        return [self.hook_dict[n] for n in matches]

    def check_reachable(self, names: Sequence[HookName], inputs: VLMInputs, run: Mapping[str, Any]) -> None:
        """Refuse hooks that would not act in this run; of a filter, if nothing it matches would.

        Args:
            run: the keyword arguments of `forward`.

        Raises:
            HookError: see `check_hook_name`; or the run does not pass the point.
        """
        for name in names:
            self.check_hook_name(name)
            matches = self._matches(name)
            reasons = [self.why_silent(n, inputs, run) for n in matches]
            if all(reasons):
                raise HookError(f"{matches[0]!r} is hooked but cannot act: {reasons[0]}")

    def why_silent(self, name: str, inputs: VLMInputs, run: Mapping[str, Any]) -> str:
        """Why a hook point would not fire in a run; empty if it would."""
        if why := self._switched_off(name):
            return f"it {why}"
        if is_vision(name) and not inputs.has_visuals:
            return "there is no image in the input"
        if is_encoder(name) and inputs.image_features is not None:
            return "the image features in these inputs were computed before"
        if run.get("resid") is not None and (is_vision(name) or name == "hook_embed"):
            return "the run starts from resid"
        start, stop = run.get("start_at_layer") or 0, run.get("stop_at_layer")
        if stop is not None and name.startswith("ln_final"):
            return f"the run stops before layer {stop}"
        if name.startswith("blocks."):
            layer, n = int(name.split(".")[1]), self.cfg.n_layers
            if layer < (start + n if start < 0 else start):
                return f"the run starts at layer {start}"
            if stop is not None and layer >= (stop + n if stop < 0 else stop):
                return f"the run stops before layer {stop}"
        return ""

    def _matches(self, name: HookName) -> list[str]:
        if isinstance(name, str):
            name = canonical(name, self.hook_dict)
            return [name] if name in self.hook_dict else []
        return [n for n in self.hook_dict if name(n)]

    def _switched_off(self, name: str) -> str:
        if why := self._replaced(name):
            return why
        for suffixes, flag in _SWITCHES:
            if name.endswith(suffixes) and not getattr(self.cfg, flag):
                return f"is switched off and would never fire: call model.set_{flag}(True) first"
        n_run = 0 if self.cfg.vision is None else self.cfg.vision.n_layers_run
        if name.startswith("vision.blocks.") and int(name.split(".")[2]) >= n_run:
            return f"lies behind the last layer that this checkpoint's projector reads ({n_run - 1})"
        return ""

    def _replaced(self, name: str) -> str:
        """Why a hook point is no longer part of the model, if another module was put in its place."""
        module: nn.Module | None = self
        for part in name.split("."):
            module = None if module is None else module._modules.get(part)
        point = self.hook_dict[name]
        if module is point or any(part is point for part in self.modules()):  # the second where a block was wrapped
            return ""
        stands = "nothing" if module is None else type(module).__name__
        return f"is not in the model any more ({stands} stands in its place): call model.setup() after such a change"
