"""From text, chat messages, pictures and Hugging Face batches to `VLMInputs`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.batching import left_pad, left_padding_mask
from hooked_vlm.inputs.context_length import too_long_message
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.messages import Messages, as_images, as_prompts, as_videos, per_prompt
from hooked_vlm.inputs.picture_processor import Bounds, PictureProcessor, as_tensor
from hooked_vlm.inputs.pixels import Pictures, prepare_pictures
from hooked_vlm.inputs.processors import processor_of
from hooked_vlm.inputs.prompt_styles import PromptStyle
from hooked_vlm.inputs.prompts import Prompt, check_placeholders, expand_placeholders, read_prompt, with_runs
from hooked_vlm.inputs.templates import style_of
from hooked_vlm.inputs.text import TextCodec, check_ids
from hooked_vlm.inputs.token_layout import InputSpec, Turns, real_span
from hooked_vlm.inputs.vlm_inputs import VLMInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_IMAGES = (
    "pixel_values", "image_grid_thw", "num_tiles", "image_sizes", "batch_num_images", "num_crops",
    "pixel_attention_mask",
)  # fmt: skip
"""What a Hugging Face batch says of its images, in one family or another."""


@dataclass(frozen=True, eq=False)
class InputBuilder:
    """Make inputs for a model: its methods are methods of `HookedVLM`, too."""

    cfg: VLMConfig
    tokenizer: "PreTrainedTokenizerBase | None"
    image_processor: PictureProcessor | None

    @property
    def text(self) -> TextCodec:
        """Encoding and decoding of text."""
        return TextCodec(self.cfg, self.tokenizer)

    def input_spec(self) -> InputSpec:
        """The model's placeholders, patches, chat turns and processors, which its inputs carry."""
        cfg, vision = self.cfg, self.cfg.vision
        style = style_of(cfg)
        return InputSpec(
            image_token_id=cfg.image_token_id if vision else None,
            video_token_id=cfg.video_token_id if vision else None,
            vision_start_token_id=cfg.vision_start_token_id,
            vision_end_token_id=cfg.vision_end_token_id,
            vision=vision,
            mrope=cfg.mrope_section is not None,
            pad_token_id=self.text.pad_ids[0],
            style=style,
            turns=self._turns(style),
            tokenizer=self.tokenizer,
            image_processor=self.image_processor,
            layouts=self.image_processor or processor_of(cfg),
        )

    def _turns(self, style: PromptStyle) -> Turns | None:
        """The tokens of a style's turns; None if the vocabulary has none that opens one."""
        ids = [self.text.special_id(start) for start in dict.fromkeys(style.turn_starts)]
        opening = tuple(i for i in ids if i is not None)
        if self.tokenizer is None or (style.turn_starts and not opening):
            return None
        end = None if style.turn_end is None else self.text.special_id(style.turn_end)
        headers = (style.user_header, style.assistant_header)
        alone = (tuple(self.text.encode(header)) for header in headers)
        behind = (() if opening else self._behind_text(header) for header in headers)
        return Turns(opening, end, *alone, *behind)

    def _behind_text(self, header: str) -> tuple[int, ...]:
        """The tokens of a header that a space sets apart from text in front of it."""
        before, both = self.text.encode("a"), self.text.encode(f"a {header}")
        return tuple(both[len(before) :]) if both[: len(before)] == before else ()

    # ---------------------------------------------------------------- prompts with pictures

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
        template: Mapping[str, Any] | None = None,
        allow_remote: bool = False,
    ) -> VLMInputs:
        """Make inputs from a prompt with its pictures, or from a list of prompts (padded on the left).

        Args:
            prompt: a text (becomes the user's turn, pictures before it), or chat messages. A list of either
                makes a batch.
            images: pictures for the prompt: one or a list, in the order of their placeholders; anything that
                `load_image` takes (paths, URIs, bytes, open files, PIL images, arrays, ...). For a list of prompts: a
                list with an entry for each. Messages may also carry them, as in Qwen's, OpenAI's and `transformers`'
                messages, with settings of their own: {"type": "image", "image": ..., "max_pixels": ...}.
            videos: the same for videos; a video is a list of frames, a 4-D array, or a file (needs PyAV: the extra
                `video`), of which frames are sampled ({"type": "video", "video": "clip.mp4", "fps": 1.0}).
            min_pixels: least area of the resized image, in pixels; the checkpoint's by default. (Qwen2-VL)
            max_pixels: largest area. A token covers `cfg.vision.pixels_per_token` squared pixels. (Qwen2-VL)
            max_tiles: largest number of tiles that an image is cut into, without its thumbnail. (InternVL, LLaVA,
                SmolVLM)
            chat: apply the checkpoint's chat template. Without it the text is taken as it stands, and
                pictures whose placeholders it lacks are put in front.
            template: arguments of the checkpoint's chat template: dict(tools=[...]), dict(add_vision_id=True),
                dict(enable_thinking=False), dict(continue_final_message=True). One that it does not read is refused.
            allow_remote: fetch pictures and videos at http(s) addresses, which are refused otherwise.

        The steps: read the prompts as text with one placeholder per picture, prepare the pixels, tokenize, repeat
        each placeholder to the tokens of its picture, check the length, pad on the left.

        Raises:
            InputError: placeholders and pictures that disagree, a prompt longer than the context, no tokenizer, a key
                of a message that has no effect.
            ImageError: a picture that cannot be read.
        """
        prompts = self._read(prompt, images, videos, chat, template)
        bounds = Bounds(min_pixels, max_pixels, max_tiles)
        processor = None if self.image_processor is None else self.image_processor.with_bounds(bounds)
        spec = replace(self.input_spec(), image_processor=processor)  # for with_image, too
        times = self.cfg.vision is not None and self.cfg.vision.video_times
        pictures = prepare_pictures(prompts, processor, bounds, allow_remote, video_times=times)
        rows = self._tokenize(prompts, pictures, spec, chat)
        if max(map(len, rows)) > self.cfg.n_ctx_limit:
            bounded = pictures.bounded_by_call(prompts, processor is None or processor.resizes_single)
            raise InputError(too_long_message(rows, bounded, processor, bounds, self.cfg))
        settings = tuple(image.settings for prompt in prompts for image in prompt.images)
        ids = [torch.tensor(row) for row in rows]
        tokens, mask = left_pad(ids, [torch.ones_like(row) for row in ids], spec.pad_token_id)
        inputs = VLMInputs(
            tokens,
            spec,
            mask,
            pixel_values=pictures.pixels,
            image_grid_thw=pictures.grids,
            pixel_values_videos=pictures.video_pixels,
            video_grid_thw=pictures.video_grids,
            image_layouts=tuple(pictures.layouts) or None,
            video_layouts=tuple(pictures.video_layouts) or None,
            image_settings=settings if any(own.resizes for own in settings) else None,
        )
        return inputs.to(self.cfg.device)

    def _read(
        self, prompt: Any, images: Any, videos: Any, chat: bool, template: Mapping[str, Any] | None
    ) -> list[Prompt]:
        """Every prompt as text with its own pictures."""
        prompts, batched = as_prompts(prompt)
        image_lists = per_prompt(images, len(prompts), batched, "images", as_images)
        video_lists = per_prompt(videos, len(prompts), batched, "videos", as_videos)
        self._check_sight(any([*image_lists, *video_lists]))
        given = zip(prompts, image_lists, video_lists, strict=True)
        read = [read_prompt(one, its, videos, self.text, chat, template) for one, its, videos in given]
        self._check_sight(any(one.images or one.videos for one in read))
        return read

    def _tokenize(self, prompts: list[Prompt], pictures: Pictures, spec: InputSpec, chat: bool) -> list[list[int]]:
        """Token ids of every prompt, each placeholder repeated to the tokens of its picture."""
        images, videos = iter(pictures.layouts), iter(pictures.video_layouts)
        rows = []
        for row, prompt in enumerate(prompts):
            ids = self.text.encode_prompt(prompt.text, chat)
            check_ids(torch.tensor([ids], dtype=torch.long), self.cfg.d_vocab)
            check_placeholders(ids, row, len(prompt.images), len(prompt.videos), spec)
            own = list(islice(images, len(prompt.images))), list(islice(videos, len(prompt.videos)))
            written = prompt.text
            for placeholder, layouts in zip((self.text.image_token, self.text.video_token), own, strict=True):
                written = with_runs(written, placeholder, self.text.marked(placeholder), layouts)
            if written != prompt.text:
                ids = self.text.encode_prompt(written, chat)
            runs = [iter([n for layout in layouts for n in layout.runs]) for layouts in own]
            by_token = dict(zip((spec.image_token_id, spec.video_token_id), runs, strict=True))
            rows.append(list(expand_placeholders(ids, by_token, spec)))
        return rows

    def _check_sight(self, pictures: bool) -> None:
        if pictures and self.cfg.vision is None:
            raise InputError(f"{self.cfg.model_name or 'this model'} takes no images: it has no vision tower")

    # ---------------------------------------------------------------- tokens

    def from_text_or_ids(self, input: Any) -> VLMInputs:
        """Inputs on the model's device from raw text or bare token ids.

        Raises:
            InputError: something else, ids outside the vocabulary, no tokens at all.
        """
        if not isinstance(input, Tensor):
            return self.to_inputs(input, chat=False)
        tokens = input[None] if input.ndim == 1 else input
        if tokens.ndim != 2 or tokens.dtype.is_floating_point:
            raise InputError(
                f"expected token ids [batch, pos], got {tuple(input.shape)} of {input.dtype} "
                "(to start from a residual stream pass the inputs and start_at_layer=, resid=)"
            )
        check_ids(tokens, self.cfg.d_vocab)
        tokens = tokens.to(self.cfg.device)
        mask = torch.ones_like(tokens) if self.tokenizer is None else left_padding_mask(tokens, self.text.pad_ids)
        return VLMInputs(tokens, self.input_spec(), mask)

    def to_tokens(self, input: Any, prepend_bos: bool | None = None) -> Any:
        """Token ids [batch, pos] of raw text, padded on the left; `VLMInputs` and tensors unchanged.

        Raises:
            InputError: `prepend_bos=True` for a tokenizer without such a token, or text with placeholders.
        """
        if isinstance(input, VLMInputs | Tensor):
            return input
        inputs = self.to_inputs(input, chat=False)
        if not prepend_bos:
            return inputs.tokens
        bos_id: int | None = self.text.require_tokenizer().bos_token_id
        if bos_id is None:
            raise InputError("this tokenizer has no beginning-of-text token to prepend")
        tokens = torch.cat((inputs.tokens[:, :1], inputs.tokens), dim=1)
        for row, first in enumerate(inputs.first):
            tokens[row, first] = bos_id
        return tokens

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> list[str] | list[list[str]]:
        """Every token of one text, [pos] ids or a batch of one, as a string; of a list of texts, a list for each.

        Raises:
            InputError: a batch of several rows of ids.
        """
        if isinstance(input, list | tuple) and all(isinstance(text, str) for text in input):
            return [self.to_str_tokens(text, prepend_bos) for text in input]  # pyright: ignore[reportReturnType]
        tokens = self.to_tokens(input, prepend_bos)
        ids = tokens.tokens if isinstance(tokens, VLMInputs) else tokens
        if ids.ndim == 2 and len(ids) != 1:
            raise InputError(f"to_str_tokens takes one text, got a batch of {len(ids)}")
        return [str(self.text.to_string([i])) for i in ids.reshape(-1).tolist()]

    def chat_text(self, prompt: str | Messages) -> str:
        """Render a prompt without pictures in the checkpoint's chat template.

        Raises:
            InputError: there is no chat template.
        """
        return read_prompt(prompt, [], [], self.text, chat=True).text

    # ---------------------------------------------------------------- Hugging Face batches

    def inputs_from_hf(self, batch: Mapping[str, Any]) -> VLMInputs:
        """Make inputs from the output of a Hugging Face processor.

        Reads `input_ids`, `attention_mask`, `pixel_values`, `image_grid_thw`, `pixel_values_videos`,
        `video_grid_thw` and `second_per_grid_ts`; for models that tile images `pixel_values` [tile, 3, height, width]
        and `num_tiles` [image], the number of tiles of each image with its thumbnail (without it, every run of
        placeholders is one image), or `pixel_values` [image, tile, 3, height, width], `image_sizes` [image, (height,
        width)] and `batch_num_images`, or [row, tile, 3, height, width] and `pixel_attention_mask`. Other keys
        (`mm_token_type_ids`, ...) are ignored, since positions are computed here.

        Raises:
            InputError: images and placeholders disagree, or token ids outside the vocabulary.
        """
        tokens, spec = self._input_ids(batch), self.input_spec()
        mask = self._tensor(batch, "attention_mask")
        if mask is not None and mask.numel() != tokens.numel():
            raise InputError(f"attention_mask is {tuple(mask.shape)}, input_ids are {tuple(tokens.shape)}")
        pictures = {name: self._tensor(batch, name) for name in OF_IMAGES}
        self._check_pixel_width(pictures["pixel_values"])
        pixels, grids, layouts = pictures["pixel_values"], pictures["image_grid_thw"], None
        if spec.layouts is not None and pixels is not None:
            pixels, grids, found = spec.layouts.read_batch(tokens, pictures, spec)
            layouts = None if found is None else tuple(found)
        videos = (self._tensor(batch, "pixel_values_videos"), self._tensor(batch, "video_grid_thw"))
        if spec.layouts is not None:
            videos = spec.layouts.read_videos(*videos)
        timed = self._timed(spec, videos[1], self._tensor(batch, "second_per_grid_ts"))
        mask = torch.ones_like(tokens) if mask is None else mask.reshape(tokens.shape)
        return VLMInputs(
            tokens,
            spec,
            mask,
            pixels,
            grids,
            *videos,
            image_layouts=layouts,
            video_layouts=timed,
            n_generated=self._n_suffix(mask, batch),
        )

    def _n_suffix(self, mask: Tensor, batch: Mapping[str, Any]) -> tuple[int, ...]:
        """Number of tokens behind the prompt of each row, of models whose prompts are seen both ways: those of type 1.

        Raises:
            InputError: they do not end their row, or there are labels, hence an answer, and no types.
        """
        types = self._tensor(batch, "token_type_ids")
        if self.cfg.bidirectional != "prompt" or (types is None and batch.get("labels") is None):
            return ()
        if types is None:
            raise InputError(
                "this batch has labels, so that an answer follows each prompt, but no token_type_ids that say where it "
                "begins: it would be seen as a part of the prompt. Call the processor with return_token_type_ids=True"
            )
        types = (types.reshape(mask.shape) == 1) & mask.bool()
        counts, (_, stop) = types.sum(1).tolist(), real_span(mask)
        if any(not types[row, end - n : end].all() for row, (n, end) in enumerate(zip(counts, stop, strict=True))):
            raise InputError(
                "token_type_ids must be 0 for the tokens of a prompt and 1 for those behind it, got others"
            )
        return tuple(counts)

    def _timed(self, spec: InputSpec, grids: Tensor | None, seconds: Tensor | None) -> tuple[ImageLayout, ...] | None:
        """Layouts of videos of whose frames each takes so many seconds."""
        if grids is None or seconds is None:
            return None
        if seconds.shape != (len(grids),):
            raise InputError(f"second_per_grid_ts must have a number for each of {len(grids)} videos, got {seconds}")
        every = zip(grids.tolist(), seconds.tolist(), strict=True)
        return tuple(replace(spec.layout_of((t, h, w), "video"), seconds=each) for (t, h, w), each in every)

    def _input_ids(self, batch: Mapping[str, Any]) -> Tensor:
        tokens = self._tensor(batch, "input_ids")
        if tokens is None:
            raise InputError(f"a batch needs input_ids, got the keys {sorted(batch)}")
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        if tokens.ndim != 2 or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
            raise InputError(f"input_ids must be token ids [batch, pos], got {tuple(tokens.shape)} of {tokens.dtype}")
        check_ids(tokens, self.cfg.d_vocab)
        return tokens

    def _tensor(self, batch: Mapping[str, Any], name: str) -> Tensor | None:
        return as_tensor(batch, name, self.cfg.device)

    def _check_pixel_width(self, pixels: Tensor | None) -> None:
        self._check_sight(pixels is not None)
        vision = self.cfg.vision
        if pixels is None or vision is None:
            return
        if not pixels.ndim:
            raise InputError("pixel_values must be a tensor of pixels, got a single number")
        if vision.patch_order == "blocks":
            width, layout, expected = pixels.shape[-1], "[patch, d_patch]", f"d_patch = {vision.d_patch}"
            fits = width == vision.d_patch
        else:
            width, layout = pixels.shape[max(-3, -pixels.ndim)], "[tile, channel, height, width]"
            fits, expected = width == vision.in_channels, f"{vision.in_channels} channels"
        if not fits:
            raise InputError(f"pixel_values must be {layout} with {expected}, got {tuple(pixels.shape)}")
