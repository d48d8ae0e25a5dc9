"""Tokenizers: captions and prompts to fixed-length token ids. The work is done by `tokenizers`.

Ours are trained on captions; CLIP's and BERT's come with the checkpoints that need them.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from latent_diffusion_jax.runtime import files
from latent_diffusion_jax.runtime.errors import StorageError, UserError
from latent_diffusion_jax.runtime.texts import first_line

PAD, START, END = "[PAD]", "[CLS]", "[SEP]"
JSON_FILE = "tokenizer.json"
# Beside the vocabulary in the folders of transformers.
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MIN_VOCABULARY = 32  # fewer tokens are special ones only
MAX_LENGTH = 1 << 16  # tokens of a caption that a tokenizer.json may ask for
MAX_FILE = 64 << 20  # bytes; CLIP's tokenizer.json has 2 to 4 MB


def train(captions: Iterable[str], vocab_size: int, max_length: int) -> tokenizers.Tokenizer:
    """A lower-casing byte-level BPE tokenizer, trained on captions.

    It knows every text, since all 256 bytes are tokens. It pads and cuts to `max_length` tokens;
    both are part of its `tokenizer.json`. The paper has BERT's WordPiece; the same captions give
    other token ids in every run of WordPiece's trainer, and of this one the same ones.

    Raises:
      UserError: the vocabulary has no room for the bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 3:
        raise UserError(f"tokenizer.vocab_size={vocab_size} must be at least {len(alphabet) + 3}")
    tokenizer = _without_ends(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return _with_ends(tokenizer, max_length)


def load(text: str, where: str = JSON_FILE) -> tokenizers.Tokenizer:
    """The tokenizer of a `tokenizer.json` that `train` made, given its contents.

    It is built anew from the file's tokens, merges and length. All else must be as `train` has it:
    what else `tokenizers` can be told gives ids that mean nothing, or does not end.

    Args:
      text: the contents.
      where: they are from, for messages.

    Raises:
      UserError: it is not one.
    """
    with _errors_told(f"damaged {where}"):
        found = json.loads(text)
        if not isinstance(found, dict) or not isinstance(model := found.get("model"), dict):
            raise ValueError("it is no tokenizer")
        _check_ids(model.get("vocab"))
        if lost := set(pre_tokenizers.ByteLevel.alphabet()).difference(model["vocab"]):
            raise ValueError(f"it has no token for the byte that is written as {min(lost)!r}")
        length = (found.get("truncation") or {}).get("max_length")
        padded = (found.get("padding") or {}).get("strategy")
        if type(length) is not int or padded != {"Fixed": length}:
            raise ValueError("it does not pad and cut to a fixed length")
        if not 3 <= length <= MAX_LENGTH:
            raise ValueError(f"it pads to {length} tokens; 3 to {MAX_LENGTH} are expected")
        # Older versions of `tokenizers` write a pair as one text.
        if not isinstance(given := model.get("merges"), list):
            raise ValueError("its model is not as training here writes it")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in given]
        model["merges"], merges = pairs, [(left, right) for left, right in pairs]
        tokenizer = _without_ends(models.BPE(model["vocab"], merges))
        tokenizer.add_special_tokens([PAD, START, END])
        _with_ends(tokenizer, length)
        written = json.loads(tokenizer.to_str())
        for name in written.keys() | found.keys():
            if not _same(found.get(name), written.get(name)):
                raise ValueError(f"its {name} is not as training here writes it")
        _check_encoding(tokenizer, [tokenizer.token_to_id(token) for token in (START, END, PAD)])
    return tokenizer


def _same(found: object, written: object) -> bool:
    """Whether parts of a `tokenizer.json` are the same, but for fields within them that another
    version of `tokenizers` has not, or leaves empty."""
    if isinstance(found, dict) and isinstance(written, dict):
        return all(_same(found[key], written.get(key)) for key in found)
    if isinstance(found, list) and isinstance(written, list):
        return len(found) == len(written) and all(map(_same, found, written))
    return found == written or (written is None and not found)


def _without_ends(model: models.BPE) -> tokenizers.Tokenizer:
    """A tokenizer of `train` but for start, end and length."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_ends(tokenizer: tokenizers.Tokenizer, max_length: int) -> tokenizers.Tokenizer:
    """The same one; it adds start and end, and pads and cuts to so many tokens."""
    ids = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=ids
    )
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PAD), pad_token=PAD, length=max_length)
    return tokenizer


@contextlib.contextmanager
def _errors_told(beginning: str) -> Iterator[None]:
    """Whatever the block raises becomes a UserError, whose message begins with `beginning`."""
    try:
        yield
    except BaseException as error:
        # A panic in Rust comes as a BaseException, of a class that cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{beginning}: {first_line(error)}") from error


def _check_ids(vocabulary: object) -> None:
    """Raises ValueError where N tokens do not have the ids 0 to N - 1, each its own.

    Those of CLIP, BERT and `train` do, with added tokens too. Any other id would be of no vector
    in the text encoder, or of another token's.
    """
    if not isinstance(vocabulary, dict):
        raise ValueError("it has no vocabulary")
    tokens: dict[int, str] = {}
    for token, i in vocabulary.items():
        if type(i) is not int or not 0 <= i < len(vocabulary):
            raise ValueError(
                f"the token {token[:40]!r} has the id {str(i)[:40]}; the ids of "
                f"{len(vocabulary)} tokens are 0 to {len(vocabulary) - 1}"
            )
        if i in tokens:
            raise ValueError(f"the tokens {tokens[i][:40]!r} and {token[:40]!r} share the id {i}")
        tokens[i] = token


def _check_encoding(tokenizer: tokenizers.Tokenizer, special: Sequence[int | None]) -> None:
    """Raises ValueError where texts are not start, tokens, end and padding, the `special` ones."""
    start, end, pad = special
    length = max_length(tokenizer)
    empty, long = encode(tokenizer, ["", "a 日 " * length])
    if list(empty) != [start, end] + (length - 2) * [pad]:
        raise ValueError("it does not make start, end and padding of the empty text")
    if (long[0], long[-1]) != (start, end):
        raise ValueError("it does not put start and end around a long text")


def max_length(tokenizer: tokenizers.Tokenizer) -> int:
    """Length in tokens of every encoded caption."""
    assert tokenizer.padding is not None  # `train` and `load` see to it
    return tokenizer.padding["length"]


def encode(tokenizer: tokenizers.Tokenizer, captions: Sequence[str]) -> np.ndarray:
    """Captions -> token ids, int32 [N, max_length]."""
    return np.array([e.ids for e in tokenizer.encode_batch(list(captions))], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptTokenizer:
    """Prompts to token ids, whichever tokenizer does it: ours, CLIP's or BERT's.

    Attributes:
      backend: adds start and end, pads and cuts to a fixed length.
      files: contents of the tokenizer's files by name, which `save` writes again.
    """

    backend: tokenizers.Tokenizer
    files: Mapping[str, bytes]

    @property
    def max_length(self) -> int:
        """Length in tokens of every encoded prompt."""
        return max_length(self.backend)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the special ones too; ids are below it."""
        return self.backend.get_vocab_size()

    @property
    def null(self) -> np.ndarray:
        """Token ids [max_length] of the empty prompt: start, end, padding."""
        return self.encode([""])[0]

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts -> token ids, int32 [N, max_length]."""
        return encode(self.backend, prompts).reshape(-1, self.max_length)

    def words(self, text: str) -> list[list[tuple[int, int]]]:
        """All of a text's words as tokens (id, first character), without start, end and padding.

        A word is what the tokenizer merges no tokens across: letters, a digit, punctuation.
        """
        encoding = self._unbounded.encode(text, add_special_tokens=False)
        words: list[list[tuple[int, int]]] = []
        before = None
        for token, (start, _), word in zip(
            encoding.ids, encoding.offsets, encoding.word_ids, strict=True
        ):
            if word is None or word != before:
                words.append([])
            words[-1].append((token, start))
            before = word
        return words

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the tokenizer's files into a folder, which is made.

        Raises:
          StorageError: they cannot be written.
        """
        folder = pathlib.Path(folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in self.files.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise StorageError(
                f"cannot write the tokenizer to {folder}: {error.strerror}"
            ) from error

    @functools.cached_property
    def _unbounded(self) -> tokenizers.Tokenizer:
        """The tokenizer without padding and cutting."""
        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        return copy


def prompt_tokenizer(tokenizer: tokenizers.Tokenizer) -> PromptTokenizer:
    """A tokenizer of `train` or `load` with the face that it shares with the others."""
    return PromptTokenizer(tokenizer, {JSON_FILE: tokenizer.to_str().encode()})


def load_clip(
    folder: str | pathlib.Path, vocab_size: int | None = None, max_length: int = 77
) -> PromptTokenizer:
    """CLIP's tokenizer from a folder of transformers' `CLIPTokenizer`.

    Padding is with the files' `pad_token`: the end token in Stable Diffusion 1, "!" in 2.

    Args:
      folder: has `vocab.json` and `merges.txt`, or `tokenizer.json`.
      vocab_size: of the text encoder, which the tokenizer's must be.
      max_length: of the text encoder, in tokens.

    Raises:
      UserError: the folder or its files are missing or damaged, or are another checkpoint's.
    """
    needed = (("vocab.json", "merges.txt"), (JSON_FILE,))
    ends = ("bos_token_id", "eos_token_id")
    tokenizer = _load_pretrained("CLIPTokenizer", folder, needed, ends, vocab_size, max_length)
    if JSON_FILE not in tokenizer.files:
        _check_merges(tokenizer, str(folder))
    return tokenizer


def load_trained(
    folder: str | pathlib.Path, vocab_size: int | None = None, max_length: int | None = None
) -> PromptTokenizer:
    """A tokenizer of `train` from a folder with its `tokenizer.json`; arguments as `load_bert`'s.

    Raises:
      UserError: the file is missing or damaged, or is another checkpoint's.
    """
    path = pathlib.Path(folder).expanduser() / JSON_FILE
    try:
        text = files.read_bytes(path, MAX_FILE).decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the tokenizer {path}: {reason}") from error
    found = prompt_tokenizer(load(text, str(path)))
    for what, size, wanted in (
        ("knows", found.vocab_size, vocab_size),
        ("pads to", found.max_length, max_length),
    ):
        if wanted not in (None, size):
            raise UserError(
                f"the tokenizer {path} {what} {size} tokens and the text encoder {wanted}: it is "
                f"not the checkpoint's"
            )
    return found


def load_bert(
    folder: str | pathlib.Path, vocab_size: int | None = None, max_length: int = 77
) -> PromptTokenizer:
    """BERT's tokenizer, which LDM's text-to-image models have, from a `BertTokenizer`'s folder.

    Args:
      folder: has `vocab.txt` or `tokenizer.json`.
      vocab_size: of the text encoder, which the tokenizer's must be.
      max_length: of the text encoder, in tokens.

    Raises:
      UserError: the folder or its files are missing or damaged, or are another checkpoint's.
    """
    needed = (("vocab.txt",), (JSON_FILE,))
    ends = ("cls_token_id", "sep_token_id")
    return _load_pretrained("BertTokenizer", folder, needed, ends, vocab_size, max_length)


def _check_merges(tokenizer: PromptTokenizer, folder: str) -> None:
    """Without all of its merges a tokenizer works, and gives shorter tokens than it should."""
    lines = tokenizer.files["merges.txt"].decode().splitlines()
    known = {line.replace(" ", "") for line in lines}
    special = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}
    lost = [
        token
        for token in json.loads(tokenizer.files["vocab.json"])
        if len(token.removesuffix("</w>")) > 1 and token not in known and token not in special
    ]
    if lost:
        raise UserError(
            f"merges.txt of the tokenizer in {folder} is cut short: it makes none of {len(lost)} "
            f"tokens of vocab.json, such as {lost[0]!r}"
        )


def _load_pretrained(
    class_name: str,
    folder: str | pathlib.Path,
    needed: tuple[tuple[str, ...], ...],
    ends: tuple[str, str],
    vocab_size: int | None,
    max_length: int,
) -> PromptTokenizer:
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no tokenizer folder {folder}")
    # transformers makes an empty tokenizer, and no error, where files are missing.
    if not any(all((folder / name).exists() for name in names) for names in needed):
        wanted = ", or ".join(" and ".join(names) for names in needed)
        raise UserError(f"{folder} holds no {class_name}: it needs {wanted}")
    # It would say that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # takes a second, and our own tokenizers do without

    with _errors_told(f"cannot read the tokenizer in {folder}"):
        known = {
            name: files.read_bytes(folder / name, MAX_FILE)
            for name in (*(name for names in needed for name in names), *SETTINGS_FILES)
            if (folder / name).exists()
        }
        # transformers drops tokens whose ids are too large for it.
        if "vocab.json" in known:
            _check_ids(json.loads(known["vocab.json"].decode()))
        if JSON_FILE in known:
            _check_ids(json.loads(known[JSON_FILE].decode())["model"]["vocab"])
        pretrained = getattr(transformers, class_name).from_pretrained(
            str(folder), local_files_only=True
        )
        backend = pretrained.backend_tokenizer
        _check_ids(backend.get_vocab())
        # At the right, whatever the files say: the text encoders know no other sides.
        backend.enable_truncation(max_length)
        backend.enable_padding(
            pad_id=pretrained.pad_token_id, pad_token=pretrained.pad_token, length=max_length
        )
        special = (*ends, "pad_token_id")
        _check_encoding(backend, [getattr(pretrained, name) for name in special])
    size = backend.get_vocab_size()
    if size < MIN_VOCABULARY:
        raise UserError(f"the tokenizer in {folder} is empty: it has {size} tokens")
    if vocab_size not in (None, size):
        raise UserError(
            f"the tokenizer in {folder} has {size} tokens and the text encoder {vocab_size}: it "
            f"is not the checkpoint's"
        )
    return PromptTokenizer(backend, known)
