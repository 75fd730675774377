"""From text, chat messages, pictures and Hugging Face batches to `VLMInputs`; and from tokens to text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.chat_templates import rendered
from hooked_vlm.inputs.context_length import too_long
from hooked_vlm.inputs.images import ImageProcessor
from hooked_vlm.inputs.messages import Messages, as_images, as_videos, per_prompt, take_pictures
from hooked_vlm.inputs.templates import IMAGE_SLOT, template_named
from hooked_vlm.inputs.tiles import TileProcessor
from hooked_vlm.inputs.token_layout import InputSpec, tile_grids
from hooked_vlm.inputs.vlm_inputs import VLMInputs


class PromptMixin(nn.Module):
    """Tokens and inputs of a `HookedVLM`."""

    cfg: VLMConfig
    tokenizer: Any
    image_processor: ImageProcessor | TileProcessor | None

    def input_spec(self) -> InputSpec:
        """What `VLMInputs` need to know of this model."""
        cfg, vision = self.cfg, self.cfg.vision
        return InputSpec(
            image_token_id=cfg.image_token_id if vision else None,
            video_token_id=cfg.video_token_id if vision else None,
            vision_end_token_id=cfg.vision_end_token_id,
            patch_size=vision.patch_size if vision else 1,
            merge_size=vision.merge_size if vision else 1,
            mrope=cfg.mrope_section is not None,
            tile_size=vision.tile_size if vision else None,
            pad_token_id=self._pad_ids()[0],
            **self._turns(),
            tokenizer=self.tokenizer,
            image_processor=self.image_processor,
        )

    def _pad_ids(self) -> list[int]:
        """Tokens that stand for nothing in front of a row: ours first, then the tokenizer's own, if another."""
        ids = [self.cfg.pad_token_id, getattr(self.tokenizer, "pad_token_id", None)]
        known = [i for i in ids if i is not None and i < self.cfg.d_vocab]
        return list(dict.fromkeys(known)) or [*self.cfg.eos_token_ids, 0][:1]

    def _turns(self) -> dict[str, Any]:
        """Which tokens open and close a chat turn."""
        starts, stop, header = ("<|im_start|>",), "<|im_end|>", "<|im_start|>user\n"
        if self.cfg.chat_template is not None:
            template = template_named(self.cfg.chat_template)
            starts, stop, header = template.turn_starts, template.stop, template.user_header
        ids = [self._special_id(start) for start in dict.fromkeys(starts)]
        opening = tuple(i for i in ids if i is not None)
        if not opening:
            return {}
        length = len(self._ids(header))
        return {"turn_start_ids": opening, "turn_end_id": self._special_id(stop), "user_header": length}

    def inputs_of(self, input: Any) -> VLMInputs:
        """Raw text or bare token ids as inputs on the model's device; see `as_inputs`."""
        if not isinstance(input, Tensor):
            return self.to_inputs(input, chat=False)
        tokens = input[None] if input.ndim == 1 else input
        if tokens.ndim != 2 or tokens.dtype.is_floating_point:
            raise InputError(
                f"expected token ids [batch, pos], got {tuple(input.shape)} of {input.dtype} "
                "(to start from a residual stream pass the inputs and start_at_layer=, resid=)"
            )
        self._check_ids(tokens)
        tokens, spec = tokens.to(self.cfg.device), self.input_spec()
        real = torch.ones_like(tokens) if self.tokenizer is None else _real_tokens(tokens, self._pad_ids())
        return VLMInputs(tokens, spec, real)

    def to_inputs(
        self,
        prompt: str | Messages | Sequence[str] | Sequence[Messages],
        images: Any = None,
        videos: Any = None,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_tiles: int | None = None,
        chat: bool = True,
    ) -> VLMInputs:
        """Inputs from a prompt with its pictures, or from a list of prompts (padded on the left).

        Args:
            prompt: a text (becomes the user's turn, pictures before it), or chat messages. A list of either
                makes a batch.
            images: pictures (paths, PIL images, uint8 arrays) for the prompt: one or a list, in the order
                of their placeholders. For a list of prompts: a list with an entry for each. Messages may
                also carry them: {"type": "image", "image": ...}.
            videos: the same for videos; a video is a list of frames.
            min_pixels: the least area of the resized image, in pixels; the checkpoint's by default. (Qwen2-VL)
            max_pixels: the largest. A token covers `cfg.vision.pixels_per_token` squared pixels. (Qwen2-VL)
            max_tiles: how many tiles an image is cut into at most, its thumbnail not counted. (InternVL)
            chat: apply the checkpoint's chat template. Without it the text is taken as it stands, and
                pictures whose placeholders it lacks are put in front.

        Raises:
            InputError: placeholders and pictures that disagree, a prompt longer than the context (with the
                `max_pixels` that would fit), no tokenizer.
            ImageError: a picture that cannot be read.
        """
        several = isinstance(prompt, list | tuple) and all(isinstance(p, str | Mapping | list | tuple) for p in prompt)
        if not several and not isinstance(prompt, str):
            raise InputError(f"a prompt is a text, a list of chat messages, or a list of such prompts, got {prompt!r}")
        batched = not isinstance(prompt, str) and (not prompt or not isinstance(prompt[0], Mapping))
        prompts: list[Any] = list(prompt) if batched else [prompt]
        if not prompts:
            raise InputError("there are no prompts: the list is empty")
        image_lists = per_prompt(images, len(prompts), batched, "images", as_images)
        video_lists = per_prompt(videos, len(prompts), batched, "videos", as_videos)
        if self.cfg.vision is None and any([*image_lists, *video_lists]):
            raise self._sees_nothing()
        texts = []
        for row, one in enumerate(prompts):
            text, own_images, own_videos = self._text_of(one, image_lists[row], video_lists[row], chat)
            texts.append(text)
            image_lists[row], video_lists[row] = own_images, own_videos
        all_images = [image for row in image_lists for image in row]
        all_videos = [video for row in video_lists for video in row]
        if (all_images or all_videos) and (self.cfg.vision is None or self.image_processor is None):
            raise self._sees_nothing()

        spec = self.input_spec()
        processor = self.image_processor
        if processor is not None:
            processor = _bounded(processor, min_pixels, max_pixels, max_tiles)
            spec = replace(spec, image_processor=processor)  # for with_image, too
        pixels = grids = sizes = video_pixels = video_grids = None
        video_sizes = []
        if all_images and processor is not None:
            pixels, grids, sizes = processor(all_images)
        if all_videos and not isinstance(processor, ImageProcessor):
            raise InputError("this model takes no videos: give their frames as images")
        if all_videos and isinstance(processor, ImageProcessor):
            parts = [processor.video(frames) for frames in all_videos]
            video_sizes = [size for _, _, (size,) in parts]
            video_pixels = torch.cat([p for p, _, _ in parts])
            video_grids = torch.cat([g for _, g, _ in parts])
        # published InternVL tokenizes the rendered template as any text, beginning-of-text token included
        special = chat and self.cfg.chat_template is not None
        rows = self._expand(texts, spec, image_lists, video_lists, grids, video_grids, special)
        if max(map(len, rows)) > self.cfg.n_ctx_limit:
            n_frames = [] if video_grids is None else video_grids[:, 0].tolist()
            given = iter([(size, 1) for size in sizes or []]), zip(video_sizes, n_frames, strict=True)
            counts = zip(map(len, image_lists), map(len, video_lists), strict=True)
            pictures = [[p for n, source in zip(row, given, strict=True) for p in islice(source, n)] for row in counts]
            raise InputError(too_long(rows, pictures, processor, max_pixels, self.cfg))
        width = max(len(row) for row in rows)
        tokens = torch.full((len(rows), width), spec.pad_token_id)
        mask = torch.zeros_like(tokens)
        for r, row in enumerate(rows):
            tokens[r, width - len(row) :] = torch.tensor(row)
            mask[r, width - len(row) :] = 1
        inputs = VLMInputs(
            tokens,
            spec,
            mask,
            pixels,
            grids,
            video_pixels,
            video_grids,
            None if sizes is None else tuple((int(w), int(h)) for w, h in sizes),
        )
        return inputs.to(self.cfg.device)

    def inputs_from_hf(self, batch: Mapping[str, Any]) -> VLMInputs:
        """Inputs from what a Hugging Face processor returns.

        Reads `input_ids`, `attention_mask`, `pixel_values`, `image_grid_thw`, `pixel_values_videos` and
        `video_grid_thw`; of models that tile images `pixel_values` [tile, 3, height, width] and `num_tiles`
        [image], how many tiles each image has, thumbnail included (without it, every run of placeholders is
        one image). Other keys (`mm_token_type_ids`, ...) are ignored: positions are our own.

        Raises:
            InputError: images and placeholders disagree, or token ids outside the vocabulary.
        """
        if batch.get("input_ids") is None:
            raise InputError(f"a batch needs input_ids, this one has {sorted(batch)}")

        def tensor(name: str) -> Tensor | None:
            value = batch.get(name)
            try:
                return None if value is None else torch.as_tensor(value).to(self.cfg.device)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"{name} is no tensor ({error}): ask the processor for return_tensors='pt', padding=True"
                ) from error

        tokens = tensor("input_ids")
        assert tokens is not None
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        if tokens.ndim != 2 or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
            raise InputError(f"input_ids must be token ids [batch, pos], got {tuple(tokens.shape)} of {tokens.dtype}")
        self._check_ids(tokens)
        mask, spec = tensor("attention_mask"), self.input_spec()
        if mask is not None and mask.numel() != tokens.numel():
            raise InputError(f"attention_mask is {tuple(mask.shape)}, input_ids are {tuple(tokens.shape)}")
        pixels, grids = tensor("pixel_values"), tensor("image_grid_thw")
        self._check_pixel_width(pixels)
        if spec.tile_size is not None and pixels is not None:
            grids = tile_grids(tokens, pixels, tensor("num_tiles"), spec)
        videos = (tensor("pixel_values_videos"), tensor("video_grid_thw"))
        real = torch.ones_like(tokens) if mask is None else mask.reshape(tokens.shape)
        return VLMInputs(tokens, spec, real, pixels, grids, *videos)

    # ---------------------------------------------------------------- text

    def to_tokens(self, input: Any, prepend_bos: bool | None = None) -> Any:
        """Token ids [batch, pos] of raw text (no chat template), padded on the left; a `VLMInputs` unchanged.

        Raises:
            InputError: `prepend_bos=True` for a tokenizer without such a token, or text with placeholders.
        """
        if isinstance(input, VLMInputs | Tensor):
            return input
        inputs = self.to_inputs(input, chat=False)
        if not prepend_bos:
            return inputs.tokens
        if self.tokenizer.bos_token_id is None:
            raise InputError("this tokenizer has no beginning-of-text token to prepend")
        tokens = torch.cat((inputs.tokens[:, :1], inputs.tokens), dim=1)
        for row, first in enumerate(inputs.first):
            tokens[row, first] = self.tokenizer.bos_token_id
        return tokens

    def chat_text(self, prompt: str | Messages) -> str:
        """A prompt without pictures as the model is given it: in the checkpoint's chat template.

        Raises:
            InputError: the tokenizer has no chat template.
        """
        return self._text_of(prompt, [], [], chat=True)[0]

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of token ids [pos] or [batch, pos] (then a list), special tokens included."""
        ids = tokens.tokens if isinstance(tokens, VLMInputs) else torch.as_tensor(tokens)
        tokenizer = self._tokenizer()
        if ids.ndim <= 1:
            return tokenizer.decode(ids.reshape(-1).tolist(), clean_up_tokenization_spaces=False)
        return [tokenizer.decode(row.tolist(), clean_up_tokenization_spaces=False) for row in ids]

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> list[str]:
        """Every token of one text, [pos] ids or a batch of one, as its own string."""
        tokens = self.to_tokens(input, prepend_bos)
        ids = tokens.tokens if isinstance(tokens, VLMInputs) else tokens
        if ids.ndim == 2 and len(ids) != 1:
            raise InputError(f"to_str_tokens takes one text, not a batch of {len(ids)}")
        return [str(self.to_string([i])) for i in ids.reshape(-1).tolist()]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token.

        Raises:
            InputError: if it is none or several, which are shown.
        """
        ids = self._ids(string)
        if len(ids) != 1:
            pieces = [self.to_string([i]) for i in ids]
            raise InputError(f"{string!r} is {len(ids)} tokens, not one: {pieces}")
        return ids[0]

    # ---------------------------------------------------------------- parts

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: pass token ids, or set model.tokenizer")
        return self.tokenizer

    def _ids(self, text: str, special: bool = False) -> list[int]:
        try:
            return self._tokenizer().encode(text, add_special_tokens=special)
        except InputError:
            raise
        except Exception as error:  # the tokenizers library has no error class of its own
            raise InputError(f"the checkpoint's tokenizer cannot read {text[:80]!r}: {error}") from error

    def _check_pixel_width(self, pixels: Tensor | None) -> None:
        vision = self.cfg.vision
        if pixels is None:
            return
        if vision is None:
            raise self._sees_nothing()
        if not pixels.ndim:
            raise InputError("pixel_values must be a tensor of pixels, got a single number")
        if vision.tile_size is None:
            width, form, expected = pixels.shape[-1], "[patch, numbers of a patch]", vision.d_patch
        else:
            width, form, expected = pixels.shape[min(1, pixels.ndim - 1)], "[tile, channel, h, w]", vision.in_channels
        if width != expected:
            raise InputError(
                f"pixel_values must be {form} with {expected} in the second place, got {tuple(pixels.shape)}"
            )

    def _sees_nothing(self) -> InputError:
        return InputError(f"{self.cfg.model_name or 'this model'} takes no images: it has no vision tower")

    def _special_id(self, token: str) -> int | None:
        if self.tokenizer is None:
            return None
        token_id = self.tokenizer.convert_tokens_to_ids(token)  # the unknown token's id if there is no such token
        known = token_id is not None and self.tokenizer.convert_ids_to_tokens(token_id) == token
        return token_id if known else None

    def _check_ids(self, tokens: Int[Tensor, "batch pos"]) -> None:
        if tokens.numel() == 0:
            raise InputError("there are no tokens: the prompt is empty")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.cfg.d_vocab:
            bad = low if low < 0 else high
            raise InputError(f"token id {bad} is outside the vocabulary of {self.cfg.d_vocab}")

    def _text_of(self, prompt: Any, images: list, videos: list, chat: bool) -> tuple[str, list, list]:
        """The prompt as text with one placeholder per picture, and its pictures in order."""
        if self.cfg.chat_template is not None and chat:
            return self._text_by_name(prompt, images, videos)
        if isinstance(prompt, str) and not chat:
            missing = "" if self.image_token in prompt else self._vision_text(self.image_token) * len(images)
            if self.video_token not in prompt:
                missing += self._vision_text(self.video_token) * len(videos)
            return missing + prompt, images, videos
        if isinstance(prompt, str):
            content = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
            prompt = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
        messages, own_images, own_videos = take_pictures(prompt)
        if (own_images and images) or (own_videos and videos):
            raise InputError("pictures came both in the messages and as an argument: give them in one place")
        tokenizer = self._tokenizer()
        if getattr(tokenizer, "chat_template", None) is None:
            raise InputError("this tokenizer has no chat template: pass chat=False and the text as it should stand")
        return rendered(tokenizer, messages), images or own_images, videos or own_videos

    def _text_by_name(self, prompt: Any, images: list, videos: list) -> tuple[str, list, list]:
        """As `_text_of`, with the conversation template that the checkpoint names."""
        template = template_named(str(self.cfg.chat_template))
        if isinstance(prompt, str):
            slots = "" if IMAGE_SLOT in prompt else f"{IMAGE_SLOT}\n" * len(images)
            prompt = [{"role": "user", "content": slots + prompt}]
        messages, own_images, own_videos = take_pictures(prompt)
        if own_images and images:
            raise InputError("pictures came both in the messages and as an argument: give them in one place")
        text = template.render(messages, self.cfg.system_message)
        images = images or own_images
        if (found := text.count(IMAGE_SLOT)) != len(images):
            raise InputError(
                f"the prompt has {found} {IMAGE_SLOT} but {len(images)} images came: give one for each, or none "
                "and they stand in front"
            )
        return text.replace(IMAGE_SLOT, self._vision_text(self.image_token)), images, videos or own_videos

    @property
    def image_token(self) -> str:
        """The text of an image's placeholder."""
        return self._token_text(self.cfg.image_token_id)

    @property
    def video_token(self) -> str:
        """The text of a video's placeholder."""
        return self._token_text(self.cfg.video_token_id)

    def _token_text(self, token_id: int | None) -> str:
        return "\0" if token_id is None else self._tokenizer().convert_ids_to_tokens(token_id)

    def _vision_text(self, placeholder: str) -> str:
        marks = (self.cfg.vision_start_token_id, self.cfg.vision_end_token_id)
        start, end = (self._token_text(i) for i in marks)
        return f"{start}{placeholder}{end}"

    def _expand(
        self,
        texts: list[str],
        spec: InputSpec,
        images: list[list],
        videos: list[list],
        image_grids: Tensor | None,
        video_grids: Tensor | None,
        special: bool,
    ) -> list[list[int]]:
        """Token ids of every row, each picture's one placeholder repeated to its number of tokens."""
        grids = {
            spec.image_token_id: iter([] if image_grids is None else image_grids.tolist()),
            spec.video_token_id: iter([] if video_grids is None else video_grids.tolist()),
        }
        rows = []
        for row, text in enumerate(texts):
            ids = self._ids(text, special)
            if not ids:
                raise InputError("there are no tokens: the prompt is empty")
            for kind, token_id, n in (
                ("image", spec.image_token_id, len(images[row])),
                ("video", spec.video_token_id, len(videos[row])),
            ):
                found = ids.count(token_id) if token_id is not None else 0
                if found != n:
                    raise InputError(
                        f"prompt {row} has {found} {kind} placeholder{'s' * (found != 1)} but {n} "
                        f"{kind}{'s' * (n != 1)} came: give one {kind} for each placeholder"
                    )
            self._check_ids(torch.tensor([ids]))
            rows.append(list(self._with_placeholders(ids, spec, grids)))
        return rows

    def _with_placeholders(self, ids: list[int], spec: InputSpec, grids: dict[int | None, Any]) -> Iterator[int]:
        """Every placeholder repeated; transformers' InternVL templates leave its two marks to be added here."""
        start, end = self.cfg.vision_start_token_id, self.cfg.vision_end_token_id
        for at, token in enumerate(ids):
            if token not in grids:
                yield token
                continue
            unmarked = spec.tile_size is not None and start is not None and (at == 0 or ids[at - 1] != start)
            yield from [start] if unmarked and start is not None else []
            yield from [token] * spec.n_tokens(tuple(next(grids[token])))
            yield from [end] if unmarked and end is not None else []


def _bounded(
    processor: ImageProcessor | TileProcessor, min_pixels: int | None, max_pixels: int | None, max_tiles: int | None
) -> ImageProcessor | TileProcessor:
    """The processor with other bounds on the size of images."""
    if isinstance(processor, TileProcessor):
        if min_pixels is not None or max_pixels is not None:
            raise InputError("this model cuts images into tiles: bound them by max_tiles, not min_pixels or max_pixels")
        return processor.bounded(None, max_tiles)
    if max_tiles is not None:
        raise InputError("this model sees images whole: bound them by min_pixels and max_pixels, not max_tiles")
    bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return replace(processor, **{name: n for name, n in bounds.items() if n is not None})


def _real_tokens(tokens: Int[Tensor, "batch pos"], pad_ids: list[int]) -> Int[Tensor, "batch pos"]:
    """The attention mask of rows padded on the left, if some are and some are not; else all ones."""
    padding = torch.isin(tokens, torch.tensor(pad_ids, device=tokens.device)).long().cumprod(dim=1)
    if padding[:, 0].all():
        return torch.ones_like(tokens)
    return 1 - padding * (1 - padding.amin(dim=1, keepdim=True))
