"""What a reward model is asked and what it answers, as bytes: a header of plain values, then the raw numbers.

    b"ARMREW" │ version, 2 bytes │ length of the header, 4 bytes │ header, msgpack │ raw arrays, one after the other

Frames travel as the uint8 that they are and scores as the floats that they are, so nothing is lost, and nothing that
is read can become code. Integers of the frame are big-endian, numbers of an array little-endian. Every clip has a name,
the hash of its pixels, its frame rate, its windows with their prompts and the digest of the model; a request is named
by its clips. So a request that is sent twice has one name, and an answer says which clips it is of.

Arrays come back with the order in memory that they had: sums over another order round differently, and scores that are
computed elsewhere are to be the same numbers.
"""

import hashlib
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from framework.types import Scores, VideoBatch, Window

SCHEMA = 1
MAGIC = b"ARMREW"
FRAME = struct.Struct(">6sHI")
MEDIA_TYPE = "application/x-armillary-reward"
"""Sent with every request. No web page can send it to a service on this machine without being asked first."""
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bool": torch.bool, "uint8": torch.uint8}
MAX_HEADER = 2**26


class ProtocolError(ValueError):
    """Bytes that are no request or no answer; one line that says what is wrong."""


@dataclass(frozen=True)
class Request:
    """Clips to score. digest: of the model that is meant. clips: their names, in order."""

    digest: str
    videos: VideoBatch
    clips: tuple[str, ...]

    @classmethod
    def of(cls, videos: VideoBatch, digest: str) -> "Request":
        return cls(digest, videos, clip_names(videos, digest))

    @property
    def name(self) -> str:
        """Equal for requests of the same clips to the same model."""
        return request_name(self.clips)


@dataclass(frozen=True)
class Answer:
    """Scores with what they are of."""

    name: str
    digest: str
    clips: tuple[str, ...]
    scores: Scores


def clip_names(videos: VideoBatch, digest: str) -> tuple[str, ...]:
    """sha256 of everything that the score of a clip depends on, per clip."""
    frames = videos.frames.contiguous().cpu()
    names = []
    for clip, windows in zip(frames, videos.windows, strict=True):
        name = hashlib.sha256(repr((digest, float(videos.fps), list(clip.shape))).encode())
        for window in windows:
            name.update(repr((window.start, window.stop, window.prompt)).encode())
        name.update(raw(clip))
        names.append(name.hexdigest())
    return tuple(names)


def request_name(clips: Sequence[str]) -> str:
    """sha256 of the names of its clips."""
    return hashlib.sha256("\n".join(clips).encode()).hexdigest()


def encode_request(request: Request) -> bytes:
    """The bytes of a request."""
    videos = request.videos
    windows = [[[w.start, w.stop, w.prompt] for w in clip] for clip in videos.windows]
    return pack(
        {"id": request.name, "digest": request.digest, "clips": list(request.clips), "fps": float(videos.fps),
         "windows": windows},
        {"frames": videos.frames},
    )  # fmt: skip


def decode_request(data: bytes) -> Request:
    """The request of some bytes, its names recomputed. Raises ProtocolError."""
    header, arrays = unpack(data)
    try:
        windows = tuple(
            tuple(Window(int(start), int(stop), text(prompt)) for start, stop, prompt in clip)
            for clip in header["windows"]
        )
        videos = VideoBatch(arrays["frames"], float(header["fps"]), windows)
        request = Request.of(videos, text(header["digest"]))
        named = header["id"], tuple(header["clips"])
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"a request that is none: {type(error).__name__}: {error}") from error
    if named != (request.name, request.clips):
        raise ProtocolError("the clips of a request are not those that it names; they were changed on the way")
    return request


def encode_answer(answer: Answer) -> bytes:
    """The bytes of an answer."""
    scores = answer.scores
    header = {
        "id": answer.name, "digest": answer.digest, "clips": list(answer.clips), "signals": list(scores.values),
        "windows": list(scores.windows),
    }  # fmt: skip
    arrays = {f"value {name}": value for name, value in scores.values.items()}
    arrays |= {f"valid {name}": valid for name, valid in scores.valid.items()}
    arrays |= {f"windows {name}": windows for name, windows in scores.windows.items()}
    return pack(header, arrays)


def decode_answer(data: bytes) -> Answer:
    """The answer of some bytes; values that are not finite come back invalid. Raises ProtocolError."""
    header, arrays = unpack(data)
    try:
        signals, count = [text(name) for name in header["signals"]], len(header["clips"])
        values = {name: arrays[f"value {name}"] for name in signals}
        valid = {name: arrays[f"valid {name}"].bool() & torch.isfinite(values[name]) for name in signals}
        windows = {text(name): arrays[f"windows {name}"] for name in header["windows"]}
        lengths = {len(rows) for rows in (*values.values(), *valid.values(), *windows.values())}
        if lengths - {count} or any(v.ndim != 1 for v in values.values()) or any(w.ndim != 2 for w in windows.values()):
            raise ProtocolError(f"an answer of {count} clips with {sorted(lengths)} scores")
        named = text(header["id"]), text(header["digest"]), tuple(map(text, header["clips"]))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ProtocolError(f"an answer that is none: {type(error).__name__}: {error}") from error
    values = {name: value.masked_fill(~valid[name], torch.nan) for name, value in values.items()}
    return Answer(*named, Scores(values, valid, windows))


def pack(header: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> bytes:
    """A header of plain values and some arrays as bytes."""
    laid = {name: (array.permute(memory_order(array)), memory_order(array)) for name, array in arrays.items()}
    described = [[name, DTYPE_NAMES[array.dtype], list(array.shape), order] for name, (array, order) in laid.items()]
    text_part = messages().packb({"schema": SCHEMA, "arrays": described, **header})
    return b"".join([FRAME.pack(MAGIC, SCHEMA, len(text_part)), text_part, *(raw(array) for array, _ in laid.values())])


def memory_order(array: Tensor) -> list[int]:
    """The dimensions as they lie in memory, from the outermost to the innermost; as they are where some lie apart."""
    order = sorted(range(array.ndim), key=array.stride, reverse=True)
    return order if array.permute(order).is_contiguous() else list(range(array.ndim))


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, arrays) of what `pack` made. Raises ProtocolError for anything else, before it is believed."""
    if len(data) < FRAME.size:
        raise ProtocolError(f"{len(data)} bytes are no message")
    magic, schema, length = FRAME.unpack_from(data)
    if magic != MAGIC or schema != SCHEMA:
        raise ProtocolError(f"no message of schema {SCHEMA}; client and service must be of one version")
    if length > min(MAX_HEADER, len(data) - FRAME.size):
        raise ProtocolError(f"a header of {length} bytes in a message of {len(data)}: it was cut off")
    place = FRAME.size + length
    try:
        header = messages().unpackb(data[FRAME.size : place])
        arrays: dict[str, Tensor] = {}
        for name, dtype, shape, order in header["arrays"]:
            array, place = read_array(data, place, DTYPES[dtype], [int(n) for n in shape])
            arrays[text(name)] = array.permute([order.index(dimension) for dimension in range(array.ndim)])
    except ProtocolError:
        raise
    except Exception as error:  # msgpack has errors of many kinds, and a header may hold anything
        raise ProtocolError(f"a header that cannot be read: {type(error).__name__}: {error}") from error
    if place != len(data):
        raise ProtocolError(f"a message of {len(data)} bytes that describes {place}")
    return header, arrays


def read_array(data: bytes, place: int, dtype: torch.dtype, shape: Sequence[int]) -> tuple[Tensor, int]:
    """(the array that starts at ``place``, where the next one does)."""
    count = 1
    for n in shape:
        if n < 0:
            raise ProtocolError(f"an array of shape {list(shape)}")
        count *= n
    size = count * dtype.itemsize
    if place + size > len(data):
        raise ProtocolError(f"a message of {len(data)} bytes that describes at least {place + size}: it was cut off")
    if not count:
        return torch.empty(list(shape), dtype=dtype), place
    piece = bytearray(memoryview(data)[place : place + size])  # writable, and aligned
    return torch.frombuffer(piece, dtype=dtype).view(list(shape)), place + size


def raw(array: Tensor) -> bytes:
    """The numbers of an array, little-endian."""
    if sys.byteorder != "little":
        raise RuntimeError("rewards are served between little-endian machines")
    return array.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes() if array.numel() else b""


def text(value: object) -> str:
    """A header's text. Raises ProtocolError for anything else."""
    if not isinstance(value, str):
        raise ProtocolError(f"text is expected, got {type(value).__name__}")
    return value


def messages() -> Any:
    """msgpack. Raises ValueError with what to install."""
    try:
        import msgpack
    except ImportError as error:
        raise ValueError("serving rewards needs msgpack: pip install 'armillary[serve]'") from error
    return msgpack


DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
