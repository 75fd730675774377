"""Tokenizers of checkpoint folders, without executing any of their code.

`transformers` knows all of them but InternLM2's, which the published repositories bring as remote code around a
SentencePiece model: that one is rebuilt here from the model file and the added tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges
from transformers.utils import logging

from hooked_vlm.converters import read_json
from hooked_vlm.errors import CheckpointError

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
INTERNLM2_CLASSES = ("InternLM2Tokenizer", "InternLM2TokenizerFast")
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of `transformers` 4 and 5 for a tokenizer that is defined by its tokenizer.json alone."""
_BPE = 2  # of sentencepiece's TrainerSpec.ModelType
_CONTROL, _USER_DEFINED = 3, 4  # of sentencepiece's SentencePiece.Type


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a checkpoint folder; None if there is none.

    Raises:
        CheckpointError: its files are missing, corrupt or of a kind that is not supported.
    """
    if not any((folder / name).exists() for name in FILES):
        return None
    settings = read_json(folder, "tokenizer_config.json", default={})
    try:
        written_out = (folder / "tokenizer.json").exists()
        if settings.get("tokenizer_class") in INTERNLM2_CLASSES and not written_out:
            return _internlm2(folder, settings)
        # AutoTokenizer would replace the steps in the file by those of the model type's tokenizer
        if settings.get("tokenizer_class") in (*INTERNLM2_CLASSES, *GENERIC_CLASSES) and written_out:
            return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        with _quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **_defaults(folder, settings))
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever its readers raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def _defaults(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that transformers 4 implied, with which the checkpoints were published, and 5 does not."""
    llama = str(settings.get("tokenizer_class")).startswith("LlamaTokenizer")
    silent = "add_bos_token" not in settings and not (folder / "tokenizer.json").exists()
    return {"add_bos_token": True} if llama and silent else {}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' warning that it does not know InternVL's model_type, which no tokenizer depends on."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _internlm2(folder: Path, settings: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Rebuild InternLM2's tokenizer from its SentencePiece model and its added tokens."""
    path = folder / "tokenizer.model"
    if not path.exists():
        raise CheckpointError(f"{folder} has no tokenizer.model, which {settings['tokenizer_class']} needs")
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] (generated code)
    proto.ParseFromString(path.read_bytes())
    if proto.trainer_spec.model_type != _BPE:
        raise CheckpointError(f"{path} is not a byte-pair model, which InternLM2's tokenizer is")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    added = _added_tokens(folder, settings)
    # tokens that are looked up as a whole take no part in merging
    whole = {p.piece for p in proto.pieces if p.type in (_CONTROL, _USER_DEFINED)}
    merges = generate_merges(ids, dict(pieces), skip_tokens=whole)
    bpe = BPE(ids, merges, unk_token=proto.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    prefix = [decoders.Strip(content=" ", left=1)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *prefix]
    )
    user_defined = [AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == _USER_DEFINED]
    tokenizer.add_tokens(user_defined)
    for token_id, token in sorted(added.items()):
        tokenizer.add_tokens([token]) if not token.special else tokenizer.add_special_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{folder}: the added token {token.content!r} should have the id {token_id}, but the vocabulary "
                f"before it makes it {tokenizer.token_to_id(token.content)}"
            )
    names = _special_names(folder, settings)
    if settings.get("add_bos_token", True):
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=template_files(folder) or settings.get("chat_template"),
        model_max_length=settings.get("model_max_length"),
        **names,
    )


def template_files(folder: Path) -> dict[str, str]:
    """Chat templates in files of their own, by name: `chat_template.jinja` is the default.

    Raises:
        CheckpointError: a file that is not text.
    """
    paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (default := folder / "chat_template.jinja").exists():
        paths["default"] = default
    try:
        return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"a chat template in {folder} cannot be read: {error}") from error


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """SentencePiece's normalisation steps, in its order."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(f), to) for f, to in ((r"\A +| +\z", ""), (" {2,}", " "))]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens added to the model's pieces, by id."""
    tokens = {
        int(token_id): AddedToken(
            entry["content"],
            lstrip=entry.get("lstrip", False),
            rstrip=entry.get("rstrip", False),
            single_word=entry.get("single_word", False),
            normalized=False,
            special=entry.get("special", False),
        )
        for token_id, entry in settings.get("added_tokens_decoder", {}).items()
    }
    for content, token_id in read_json(folder, "added_tokens.json", default={}).items():
        tokens.setdefault(int(token_id), AddedToken(content, normalized=False, special=True))
    return tokens


def _special_names(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens by their role; the published class's defaults where no file names them."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    for source in (read_json(folder, "special_tokens_map.json", default={}), settings):
        for role in named:
            value = source.get(role)
            if value is not None:
                named[role] = value["content"] if isinstance(value, dict) else value
    extra = settings.get("additional_special_tokens")
    return {**named, **({"additional_special_tokens": extra} if extra else {})}
