"""Tokenizer folders of Hugging Face: loaded for every run; a small one is trained for samples.

Only the tokenizers library is imported; transformers would cost every process seconds.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import tokenizers
import xxhash

from triptych.configs.model_schema import TokensConfig
from triptych.errors import ConfigError, DataError

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Those of Qwen2-VL, in the order of its ids 151643 to 151656."""

SYSTEM_PROMPT = "You are a helpful assistant."
"""What a chat without a system turn begins with."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|>"
    "<|{{ 'video' if part.type == 'video' else 'image' }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML for transformers, which renders text and takes special tokens in it for what they are."""

# A contraction, a word with the space or sign before it, one digit, signs, line ends, or spaces.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to ids and back. Text never becomes special tokens: those come from ``tokens`` only."""

    def __init__(self, backend: tokenizers.Tokenizer, special: Mapping[str, int]) -> None:
        names = [field.name for field in fields(TokensConfig)]
        self.tokens = TokensConfig(**{name: special[name] for name in names})
        """Ids of the special tokens that a model knows."""
        self._special = special
        self.fingerprint = _fingerprint(backend)
        """Equal for tokenizers that give the same ids; xxh3-128 in hexadecimal."""
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        backend.encode_special_tokens = True  # in text they are ordinary characters
        self._backend = backend

    def __reduce__(
        self,
    ) -> tuple[type["Tokenizer"], tuple[tokenizers.Tokenizer, Mapping[str, int]]]:
        """By the constructor: a pickled backend forgets that text makes no special tokens."""
        return Tokenizer, (self._backend, self._special)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; ``<|im_end|>`` and the like in it are read as ordinary characters.

        Raises:
            DataError: it has lone surrogates, as JSON may spell them and UTF-8 cannot.
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise DataError("text is no Unicode: half of a surrogate pair stands alone") from error
        return ids

    def special(self, name: str) -> int:
        """The id of ``<|name|>``.

        Raises:
            DataError: the tokenizer lacks it.
        """
        if name not in self._special:
            raise DataError(f"the tokenizer lacks <|{name}|>  -> take that of a Qwen2-VL model")
        return self._special[name]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Loads a Hugging Face tokenizer folder.

    Raises:
        ConfigError: there is no tokenizer, or it lacks special tokens of Qwen2-VL.
    """
    folder = Path(folder)
    backend = _load_backend(folder)
    names = [field.name for field in fields(TokensConfig)]
    vocab = backend.get_vocab(with_added_tokens=True)
    missing = [
        f"<|{name}|> ({getattr(TokensConfig(), name)})"
        for name in names
        if f"<|{name}|>" not in vocab
    ]
    if missing:
        raise ConfigError(
            f"the tokenizer in {folder} lacks {len(missing)} of the special tokens of Qwen2-VL (by "
            f"their ids there): {', '.join(missing)}  -> add them, or take the tokenizer of a "
            "Qwen2-VL or Qwen2.5 model; that of a Qwen2 text model has none for pictures"
        )
    ids = {token.strip("<|>"): vocab[token] for token in SPECIAL_TOKENS if token in vocab}
    backend.encode_special_tokens = True  # in text they are ordinary characters
    forgeable = [f"<|{name}|>" for name in ids if ids[name] in backend.encode(f"<|{name}|>").ids]
    if forgeable:
        raise ConfigError(
            f"the tokenizer in {folder} does not mark as special: {' '.join(forgeable)}  -> set "
            '"special": true for them in tokenizer.json; else any text that has them could '
            "pass for an image or the end of a turn"
        )
    return Tokenizer(backend, ids)


def foreign_ids(theirs: Path, ours: Path) -> list[str]:
    """Tokens of one folder that another one lacks or gives other ids, in one line.

    Raises:
        ConfigError: one of them cannot be read.
    """
    known = _load_backend(ours).get_vocab(with_added_tokens=True)
    vocab = _load_backend(theirs).get_vocab(with_added_tokens=True)
    foreign = sorted((i, token) for token, i in vocab.items() if known.get(token) != i)
    if not foreign:
        return []
    shown = ", ".join(
        f"{token!r} is {i} there, {known.get(token)} here" for i, token in foreign[:3]
    )
    return [f"{len(foreign)} of its {len(vocab)} tokens are not those of {ours}: {shown}"]


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder  -> name one that holds a Hugging Face tokenizer")
    file = folder / "tokenizer.json"
    if not any((folder / name).is_file() for name in (file.name, "vocab.json")):
        raise ConfigError(
            f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json"
            "  -> name the folder of a Hugging Face tokenizer"
        )
    try:
        if file.is_file():
            return tokenizers.Tokenizer.from_file(str(file))
        from transformers import AutoTokenizer  # old folders hold vocab.json and merges.txt only

        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception
        raise ConfigError(f"the tokenizer in {folder} cannot be read: {error}") from error
    backend: tokenizers.Tokenizer = loaded.backend_tokenizer
    return backend


def _fingerprint(backend: tokenizers.Tokenizer) -> str:
    content = json.loads(backend.to_str())
    parts = {key: content[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE with the pieces of Qwen2, and writes a folder that transformers loads.

    The special tokens are the ids 0 to 13. Each digit is a token of its own. The same texts give
    the same tokenizer.

    Args:
        texts: what the merges are learned from.
        folder: is made; files in it are overwritten.
        vocab_size: at least 270, the special tokens and 256 bytes; fewer come out of few texts.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return load_tokenizer(folder)
