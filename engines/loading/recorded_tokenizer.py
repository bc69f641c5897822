"""Builds a model's tokenizer from its tokenizer.json alone, once a load by transformers has shown that it is the same.

transformers reads tokenizer.json into Python objects, and its tokenizer classes build the tokenizer anew from these:
BERT's and XLM-R's replace every part but the vocabulary. The first load of a folder goes that way. It keeps all parts
but the vocabulary as transformers has made them, with what the load found out (`TokenizerLimits`), if tokenizer.json
with these parts gives the same serialized tokenizer. Later loads of the same files parse tokenizer.json with the kept
parts on a thread of their own, while the weights are read. Where anything differs, transformers builds the tokenizer.
"""

import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog
import tokenizers
import transformers
from msgspec import Raw, Struct
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import Unigram

from engines.inputs.tokenizer import Tokenizer, TokenizerLimits
from engines.inputs.vocabulary import MAX_FILE_BYTES, PROBES, check_tokenizer_files, check_vocabulary
from engines.loading.folder import Folder
from engines.loading.tokenizer import ModelFacts, Reference, load_theirs, read_reference
from engines.spec import ModelSpec
from engines.storage import write_atomically
from engines.types import fingerprint

log = structlog.get_logger(__name__)

_FILE = "tokenizer.json"

_FORM = 1
"""Raised when records of before mean something else."""

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".gguf", ".npz", ".ot", ".tflite"}
"""Suffixes of files that no tokenizer reads."""

_SPECIAL = ("bos_token_id", "cls_token_id", "eos_token_id", "mask_token_id", "pad_token_id", "unk_token_id")

_FILE_FACTOR, _UNIGRAM_FACTOR, _PIECE_FACTOR = 20, 80, 160
"""Bytes of memory of a tokenizer, upper estimates: for each byte of its tokenizer.json (measured: 11 to 17, and 72 of a
unigram model), and for each byte of a unigram model's pieces, as each may be a node of a trie."""

BUILT_SHARE = 64
"""The tokenizers that are kept may take one of this many parts of main memory."""

_LONGEST_WAIT_S = 60.0
"""A load that fails never asks for its tokenizer, and its thread must end."""

MAX_RECORDS = 64
"""Records on disk, of at most a megabyte each; the oldest makes room for a new one."""


class TokenizerRecord(Struct, frozen=True):
    """What one load found out of a folder's tokenizer.

    Args:
        parts: of the serialized tokenizer, all but the vocabulary (`model`).
        is_from_lists: whether transformers hands a list of pieces and scores to the library, which otherwise reads the
            file itself.
        encodes_special: whether the text of a special token is read as text, which is not among the parts.
        probes: a digest of the ids of `PROBES`.
        facts: a digest of what the limits depend on beside the files.
        limits: see `TokenizerLimits`.
        special_ids: attributes of transformers' tokenizer.
    """

    parts: dict[str, Raw]
    is_from_lists: bool
    encodes_special: bool
    probes: str
    facts: str
    limits: TokenizerLimits
    special_ids: dict[str, int | None]


class BuiltTokenizer(NamedTuple):
    """A tokenizer and its record. Nothing changes it any more, so that several engines may read with it."""

    record: TokenizerRecord
    backend: FastTokenizer
    size_bytes: int


class TokenizerRecords:
    """Keeps records by key, on disk or in memory; and a few of the tokenizers themselves, for models that come back.

    Thread-safe: a file is replaced as a whole.

    Args:
        folder: where records are; None keeps them in memory.
        max_built_bytes: of the tokenizers that are kept, an upper estimate.
    """

    def __init__(self, folder: Path | None, max_built_bytes: int = 0) -> None:
        self._folder = folder
        self._in_memory: dict[str, bytes] = {}
        self._max_built_bytes = max_built_bytes
        self._lock = threading.Lock()
        self._built: dict[str, BuiltTokenizer] = {}

    def built(self, key: str) -> BuiltTokenizer | None:
        """Returns the tokenizer of a key; None where it is not kept. The one asked for last stays longest."""
        with self._lock:
            found = self._built.pop(key, None)
            if found is not None:
                self._built[key] = found
            return found

    def put_built(self, key: str, built: BuiltTokenizer) -> None:
        """Keeps a tokenizer, as far as there is room; others leave that were asked for longest ago."""
        with self._lock:
            self._built.pop(key, None)
            self._built[key] = built
            while sum(each.size_bytes for each in self._built.values()) > self._max_built_bytes:
                self._built.pop(next(iter(self._built)))

    def get(self, key: str) -> TokenizerRecord | None:
        """Returns the record of a key; None where there is none that can be read."""
        try:
            content = self._in_memory.get(key) if self._folder is None else (self._folder / f"{key}.json").read_bytes()
            return None if content is None else msgspec.json.decode(content, type=TokenizerRecord)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            log.warning("tokenizer.record_unreadable", reason=type(error).__name__)
            return None

    def put(self, key: str, record: TokenizerRecord) -> None:
        """Keeps a record; a disk that cannot be written is logged."""
        content = msgspec.json.encode(record)
        if self._folder is None:
            self._in_memory[key] = content
            while len(self._in_memory) > MAX_RECORDS:
                self._in_memory.pop(next(iter(self._in_memory)), None)
            return
        try:
            write_atomically(self._folder / f"{key}.json", content, is_durable=False)
            kept = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for path in kept[:-MAX_RECORDS]:
                path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("tokenizer.record_not_kept", reason=str(error))


class RecordedTokenizer:
    """The tokenizer of one load of a folder: begun before the weights are read, and needed after.

    Args:
        folder, spec: of the model.
        records: of earlier loads.
    """

    def __init__(self, folder: Folder, spec: ModelSpec, records: TokenizerRecords) -> None:
        self._folder, self._spec, self._records = folder, spec, records
        self._key = ""
        self._may_build = threading.Event()
        self._built: Future[BuiltTokenizer | None] = Future()
        if spec.trust_remote_code or folder.late is not None or not (folder.tokenizer / _FILE).exists():
            self._built.set_result(None)
        else:
            threading.Thread(target=self._build, name=f"tokenizer-{spec.model_id}", daemon=True).start()

    def proceed(self) -> None:
        """Lets the tokenizer be built, which holds the interpreter's lock for tenths of a second."""
        self._may_build.set()

    def reference(self, facts: ModelFacts) -> Reference:
        """Returns the tokenizer and its limits, which `read_reference` has checked now or at an earlier load; blocks.

        Raises:
            BrokenFiles, UnsupportedModel: see `read_reference`.
        """
        self.proceed()
        built = self._built.result()
        stated = _facts_digest(self._folder, self._spec, facts)
        if built is not None and built.record.facts == stated:
            record, backend, _ = built
            check_tokenizer_files(self._folder.tokenizer)
            check_vocabulary(backend, facts.vocab_size)
            theirs = _Theirs(self._folder, self._spec, record.special_ids)
            return Reference(Tokenizer(backend, record.limits), theirs, backend)
        reference = read_reference(self._folder, self._spec, facts)
        if self._key:
            self._keep(reference, stated)
        return reference

    def _build(self) -> None:
        """Builds the tokenizer of a known folder; on a thread. Whatever fails here, transformers reports."""
        built = None
        try:
            self._key = _key(self._folder, self._spec)
            built = self._records.built(self._key) or self._build_anew()
        except Exception as error:  # noqa: BLE001  # the tokenizers library raises bare exceptions
            log.info("tokenizer.not_built", reason=type(error).__name__)
        finally:
            self._built.set_result(built)

    def _build_anew(self) -> BuiltTokenizer | None:
        record = self._records.get(self._key)
        if record is None:
            return None
        if not self._may_build.wait(_LONGEST_WAIT_S):
            return None
        content = (self._folder.tokenizer / _FILE).read_bytes()
        backend, size_bytes = _compose(content, record.parts, is_from_lists=record.is_from_lists)
        backend.encode_special_tokens = record.encodes_special
        if _probe(backend) != record.probes or not self._is_unchanged():
            return None
        built = BuiltTokenizer(record, backend, size_bytes)
        self._records.put_built(self._key, built)
        return built

    def _is_unchanged(self) -> bool:
        """Tells whether the files that were read since are those that the key names."""
        return _key(self._folder, self._spec) == self._key

    def _keep(self, reference: Reference, facts: str) -> None:
        """Keeps what this load found out, if the tokenizer can be built from tokenizer.json."""
        backend = reference.backend
        try:
            serialized = backend.to_str()
            parts = msgspec.json.decode(serialized, type=dict[str, Raw])
            del parts["model"]
            content = (self._folder.tokenizer / _FILE).read_bytes()
            sizes = {way: _gives(content, parts, serialized, is_from_lists=way) for way in (False, True)}
        except Exception as error:  # noqa: BLE001  # parts in Python cannot be serialized, for one
            log.info("tokenizer.not_kept", reason=type(error).__name__)
            return
        is_from_lists = next((way for way, size_bytes in sizes.items() if size_bytes), None)
        if is_from_lists is None:
            log.info("tokenizer.not_kept", reason="transformers changes the vocabulary")
            return
        special_ids = {name: getattr(reference.theirs, name, None) for name in _SPECIAL}
        record = TokenizerRecord(
            parts,
            is_from_lists,
            backend.encode_special_tokens,
            _probe(backend),
            facts,
            reference.tokenizer.limits,
            special_ids,
        )
        if not self._is_unchanged():
            log.info("tokenizer.not_kept", reason="its files were written while it was loaded")
            return
        self._records.put(self._key, record)
        self._records.put_built(self._key, BuiltTokenizer(record, backend, sizes[is_from_lists]))


class _Theirs:
    """Stands for transformers' tokenizer: knows its special ids, and loads it for anything else."""

    def __init__(self, folder: Folder, spec: ModelSpec, special_ids: Mapping[str, int | None]) -> None:
        self._folder, self._spec = folder, spec
        self._loaded: Any = None
        vars(self).update(special_ids)

    def __getattr__(self, name: str) -> Any:
        if self._loaded is None:
            self._loaded = load_theirs(self._folder, self._spec)
        return getattr(self._loaded, name)


def _key(folder: Folder, spec: ModelSpec) -> str:
    """Returns a digest of all that decides how transformers builds the tokenizer.

    Files count by their content. The folder's path does, too: transformers looks model names up in it.
    """
    parts: list[object] = [_FORM, transformers.__version__, tokenizers.__version__, folder.tokenizer.absolute()]
    parts += [msgspec.json.encode(folder.transformer, order="sorted")]
    for path in sorted(folder.tokenizer.iterdir()):
        if path.suffix not in _WEIGHTS and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
            with path.open("rb") as opened:
                parts += [path.name, hashlib.file_digest(opened, "sha256").hexdigest()]
    return fingerprint(parts)


def _facts_digest(folder: Folder, spec: ModelSpec, facts: ModelFacts) -> str:
    """Returns a digest of what the limits depend on beside the tokenizer's files."""
    stated = [spec.max_tokens, spec.pooling, facts.vocab_size, facts.position_limit, facts.pooling, facts.counts_prompt]
    return fingerprint([*stated, facts.config.to_json_string(use_diff=False)])


class _Unigram(Struct):
    vocab: list[tuple[str, float]]
    unk_id: int | None = None
    byte_fallback: bool = False


class _Kind(Struct):
    type: str | None = None


def _gives(content: bytes, parts: Mapping[str, Raw], serialized: str, *, is_from_lists: bool) -> int:
    """Returns the bytes of the tokenizer that this way gives, if it is the same; else 0."""
    if is_from_lists and not _is_unigram(_vocabulary(content)):
        return 0
    made, size_bytes = _compose(content, parts, is_from_lists=is_from_lists)
    return size_bytes if made.to_str() == serialized else 0


def _vocabulary(content: bytes) -> Raw:
    return msgspec.json.decode(content, type=dict[str, Raw])["model"]


def _is_unigram(vocabulary: Raw) -> bool:
    return msgspec.json.decode(vocabulary, type=_Kind).type == "Unigram"


def _compose(content: bytes, parts: Mapping[str, Raw], *, is_from_lists: bool) -> tuple[FastTokenizer, int]:
    """Builds a tokenizer from the vocabulary in a tokenizer.json, and other parts; also returns its bytes of memory."""
    vocabulary = _vocabulary(content)
    if is_from_lists:
        model = msgspec.json.decode(vocabulary, type=_Unigram)
        return _compose_unigram(model, parts), _PIECE_FACTOR * sum(len(piece.encode()) for piece, _ in model.vocab)
    factor = _UNIGRAM_FACTOR if _is_unigram(vocabulary) else _FILE_FACTOR
    return FastTokenizer.from_buffer(msgspec.json.encode({**parts, "model": vocabulary})), factor * len(content)


def _compose_unigram(model: _Unigram, parts: Mapping[str, Raw]) -> FastTokenizer:
    """Builds a tokenizer from pieces and scores as Python reads these: to the nearest float64.

    The tokenizers library (0.23) reads every seventh score of 16 digits one unit in the last place off. Equal sums of
    scores, of which the first is taken, may then be unequal.
    """
    made = FastTokenizer(Unigram(model.vocab, unk_id=model.unk_id, byte_fallback=model.byte_fallback))
    frame = {**parts, "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}
    others = FastTokenizer.from_buffer(msgspec.json.encode(frame))
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (part := getattr(others, name)) is not None:
            setattr(made, name, part)
    for token in msgspec.json.decode(parts["added_tokens"], type=list[dict[str, Any]]):
        options = {name: value for name, value in token.items() if name not in ("id", "content")}
        add = made.add_special_tokens if token["special"] else made.add_tokens
        add([AddedToken(token["content"], **options)])
    return made


def _probe(backend: FastTokenizer) -> str:
    """Returns a digest of what the tokenizer makes of texts in ten scripts, with and without special tokens."""
    rows = [
        (row.ids, row.type_ids)
        for adds_special in (True, False)
        for row in backend.encode_batch_fast([*PROBES], add_special_tokens=adds_special)
    ]
    return fingerprint(rows)
