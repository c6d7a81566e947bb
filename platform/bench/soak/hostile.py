"""Adapters that nobody should send: valid ones, changed at random in one of many ways.

Pure functions of a random generator and bytes; what a server makes of them is the caller's
business. Some changes leave a valid adapter (a weight that is merely huge, an alpha that is merely
odd), which may be served, and must then harm nobody else.
"""

from __future__ import annotations

import io
import json
import random
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from loraplex.platform.bench.soak.world import FILES, Content

Json = Any
BOMB_BYTES = 100_000_000  # of zeros, some 100 kB packed

# Values that a key of the config may be given, of every kind that a reader may trip over.
ODD_VALUES: tuple[Json, ...] = (
    None, True, -1, 0, 1, 3, 513, 10**12, 10**400, -0.0, 1e308, 1e-320, float("nan"), float("inf"),
    "", "x", "x" * 70_000, "\ud800", "(", "(a+)+$", "(q|q)*proj", ".*", "all-linear", "..", [],
    [[]], [None], ["q_proj"] * 3000, {}, {"q_proj": -1}, {"(x+x+)+y": 4}, {"": {}},
    [[0, 1], [1, 2]],
)  # fmt: skip
ODD_ELEMENTS = {  # little-endian bytes of one element
    "F32": ("0000c07f", "0000807f", "000080ff", "ffff7f7f", "01000000", "00000080", "0000807e"),
    "BF16": ("c07f", "807f", "7f7f", "0100", "0080"),
    "F16": ("007e", "007c", "ff7b", "0100", "0080"),
}
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "f32", "", "F999")
OTHER_FORMATS: dict[str, tuple[Json, ...]] = {
    "use_dora": (True, False),
    "lora_bias": (True, False),
    "bias": ("all", "lora_only", "none"),
    "modules_to_save": (["lm_head"], ["embed_tokens"], ["layers"], ["norm", "input_layernorm"]),
    "trainable_token_indices": (
        [5, 9], [5, 9, 511, 400], [5, 5, 9], [5, 9, 512], [2**40, 9, 5], {"lm_head": [5, 9, 400]},
    ),
    "target_modules": (["lm_head"], ["embed_tokens"], ["model"], ["q_proj", "v_proj", "lm_head"]),
    "ensure_weight_tying": (True,),
}  # fmt: skip
BAD_PATHS = (
    "../adapter_config.json", "../../etc/cron.d/adapter_config.json", "/adapter_config.json",
    "a/../../adapter_config.json", "C:\\adapter_config.json", "..\\..\\adapter_config.json",
    "x" * 2000 + "/adapter_config.json", "a\0b/adapter_config.json", "./.././adapter_config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hostile:
    """An upload: config and weights, or an archive. kind: what was done to it."""

    kind: str
    config: bytes
    weights: bytes
    archive: bytes | None = None


def hostile(draw: random.Random, content: Content) -> Hostile:
    """One change at random."""
    kind = draw.choice(list(_CHANGES))
    return _CHANGES[kind](draw, content, kind)


def kinds() -> list[str]:
    return list(_CHANGES)


def of_kind(kind: str, draw: random.Random, content: Content) -> Hostile:
    return _CHANGES[kind](draw, content, kind)


# --- bytes ----------------------------------------------------------------------------------------


def _flip(draw: random.Random, data: bytes, first: int, last: int, count: int) -> bytes:
    """Flip `count` bits of data[first:last]."""
    out = bytearray(data)
    for _ in range(count):
        out[draw.randrange(first, last)] ^= 1 << draw.randrange(8)
    return bytes(out)


def _cut(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


def _split(weights: bytes) -> tuple[dict[str, Json], bytes]:
    (size,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + size]), weights[8 + size :]


def _join(header: Json, body: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


# --- the weights file -----------------------------------------------------------------------------

Edit = Callable[[random.Random, dict[str, Json], str], None]


def _overlap(draw: random.Random, header: dict[str, Json], name: str) -> None:
    other = draw.choice([key for key in header if key not in (name, "__metadata__")])
    header[name]["data_offsets"] = list(header[other]["data_offsets"])


def _offsets(draw: random.Random, header: dict[str, Json], name: str) -> None:
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = draw.choice(
        [[end, begin], [begin, begin], [begin + 1, end + 1], [-1, end - begin - 1], [2**63, 2**64],
         [begin, 10**30], [begin], [begin, end, end], None, ["0", "8"], [0.5, 8.5], [True, end]]
    )  # fmt: skip


def _shape(draw: random.Random, header: dict[str, Json], name: str) -> None:
    rows, columns = header[name]["shape"][0], header[name]["shape"][-1]  # a vector has one axis
    header[name]["shape"] = draw.choice(
        [[columns, rows], [rows * columns], [rows, columns, 1], [1, rows, columns], [0, columns],
         [-rows, -columns], [2**40, 2**40], [rows + 1, columns], [], None, [rows, "64"], [1e300, 1]]
    )  # fmt: skip


def _dtype(draw: random.Random, header: dict[str, Json], name: str) -> None:
    header[name]["dtype"] = draw.choice([d for d in DTYPES if d != header[name]["dtype"]])


def _name(draw: random.Random, header: dict[str, Json], name: str) -> None:
    entry = header.pop(name)
    header[
        draw.choice(
            [
                name + "\0",
                "../" + name,
                name.replace("lora_A", "lora_B"),
                name.upper(),
                "",
                name.replace("layers.0", "layers.7"),
                name.replace("layers.1", "layers.01"),
                name.replace("base_model", "x"),
                "__metadata__",
                "model.embed_tokens.weight",
                name.replace("q_proj", "k_proj"),
                "x" * 100_000,
                "lm_head.lora_A.weight",
            ]
        )
    ] = entry


def _extra(draw: random.Random, header: dict[str, Json], name: str) -> None:
    header[draw.choice(["__metadata__", "__proto__", name + ".extra"])] = draw.choice(
        [None, 7, "x", [], {"format": 1}, {"a": "b" * 50_000}, header[name], {"dtype": "F32"}]
    )


_EDITS: dict[str, Edit] = {
    "tensors overlap": _overlap,
    "offsets": _offsets,
    "shape": _shape,
    "dtype": _dtype,
    "tensor name": _name,
    "header entry": _extra,
}


def _edited(draw: random.Random, content: Content, kind: str) -> Hostile:
    header, body = _split(content.weights)
    _EDITS[kind](draw, header, draw.choice([k for k in header if k != "__metadata__"]))
    return Hostile(kind, content.config, _join(header, body))


def _header_bits(draw: random.Random, content: Content, kind: str) -> Hostile:
    last = 8 + struct.unpack("<Q", content.weights[:8])[0]
    weights = _flip(draw, content.weights, 0, last, draw.randint(1, 4))
    return Hostile(kind, content.config, weights)


def _values(draw: random.Random, content: Content, kind: str) -> Hostile:
    """Elements that are no numbers, or the largest, smallest and oddest that there are."""
    header, body = _split(content.weights)
    out = bytearray(body)
    entry = header[draw.choice([k for k in header if k != "__metadata__"])]
    begin, end = entry["data_offsets"]
    value = bytes.fromhex(draw.choice(ODD_ELEMENTS[entry["dtype"]]))
    step = len(value)
    if draw.random() < 0.3:
        out[begin:end] = value * ((end - begin) // step)
    else:
        for _ in range(draw.randint(1, 5)):
            at = begin + step * draw.randrange((end - begin) // step)
            out[at : at + step] = value
    return Hostile(kind, content.config, _join(header, bytes(out)))


def _body_noise(draw: random.Random, content: Content, kind: str) -> Hostile:
    """Any bits are a float: so this is mostly an adapter of wild weights."""
    begin = 8 + struct.unpack("<Q", content.weights[:8])[0]
    weights = bytearray(content.weights)
    at = draw.randrange(begin, len(weights))
    noise = draw.randbytes(min(draw.randint(1, 4096), len(weights) - at))
    weights[at : at + len(noise)] = noise
    return Hostile(kind, content.config, bytes(weights))


def _weights_cut(draw: random.Random, content: Content, kind: str) -> Hostile:
    return Hostile(kind, content.config, _cut(draw, content.weights))


def _weights_longer(draw: random.Random, content: Content, kind: str) -> Hostile:
    return Hostile(kind, content.config, content.weights + draw.randbytes(draw.randint(1, 999)))


def _another_kind(draw: random.Random, content: Content, kind: str) -> Hostile:
    pickle = b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93."
    weights = draw.choice([b"", b"\0" * 64, pickle, content.archive, content.config, b"[" * 50_000])
    return Hostile(kind, content.config, weights)


# --- the config -----------------------------------------------------------------------------------


def _config_value(draw: random.Random, content: Content, kind: str) -> Hostile:
    config = json.loads(content.config)
    for _ in range(draw.choice([1, 1, 1, 3])):
        config[draw.choice(list(config))] = draw.choice(ODD_VALUES)
    return Hostile(kind, _dumped(config), content.weights)


def _config_key(draw: random.Random, content: Content, kind: str) -> Hostile:
    config = json.loads(content.config)
    if draw.random() < 0.5:
        del config[draw.choice(list(config))]
    else:
        config[draw.choice(["", "r ", "use_dora2", "__class__", "\u202e", "auto_map"])] = (
            draw.choice(ODD_VALUES)
        )
    return Hostile(kind, _dumped(config), content.weights)


def _format(draw: random.Random, content: Content, kind: str) -> Hostile:
    """The config tells of another format than the file has, or of ends that do not meet."""
    config = json.loads(content.config)
    key = draw.choice(list(OTHER_FORMATS))
    config[key] = draw.choice([v for v in OTHER_FORMATS[key] if v != config.get(key)])
    return Hostile(kind, _dumped(config), content.weights)


def _config_bits(draw: random.Random, content: Content, kind: str) -> Hostile:
    config = _flip(draw, content.config, 0, len(content.config), draw.randint(1, 3))
    return Hostile(kind, config, content.weights)


def _config_whole(draw: random.Random, content: Content, kind: str) -> Hostile:
    raw = [b"", b"null", b"[]", b"7", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 100_000, b"{" * 9]
    twice = content.config.replace(b'"r":', b'"r": 2, "r":', 1)
    config = draw.choice([*raw, twice, _cut(draw, content.config), b" " * 2_000_000])
    return Hostile(kind, config, content.weights)


def _dumped(config: Json) -> bytes:
    # Lone surrogates and numbers that are none are what some writers do send.
    return json.dumps(config).encode("utf-8", "surrogatepass")


# --- archives -------------------------------------------------------------------------------------


def _zipped(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def _tarred(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _both(content: Content) -> list[tuple[str, bytes]]:
    return list(zip(FILES, (content.config, content.weights), strict=True))


def _archive_path(draw: random.Random, content: Content, kind: str) -> Hostile:
    path, (_, weights) = draw.choice(BAD_PATHS), _both(content)
    if draw.random() < 0.5:
        packed = _zipped((path, content.config), weights)
    else:
        packed = _tarred(
            (tarfile.TarInfo(path), content.config), (tarfile.TarInfo(weights[0]), weights[1])
        )
    return _archive(kind, content, packed)


def _archive_link(draw: random.Random, content: Content, kind: str) -> Hostile:
    """A link, device or pipe under a wanted name, or beside the wanted ones."""
    name = draw.choice([*FILES, "notes.txt"])
    others = [(n, d) for n, d in _both(content) if n != name]
    if draw.random() < 0.3:
        link = zipfile.ZipInfo(name)
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        return _archive(kind, content, _zipped((link, b"/etc/passwd"), *others))
    info = tarfile.TarInfo(name)
    info.type = draw.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
    info.linkname = draw.choice(["/etc/passwd", "../../registry.sqlite", FILES[0], name])
    return _archive(
        kind, content, _tarred((info, b""), *((tarfile.TarInfo(n), d) for n, d in others))
    )


def _archive_bomb(draw: random.Random, content: Content, kind: str) -> Hostile:
    name = draw.choice([FILES[1], "padding.bin"])
    members = [(n, d) for n, d in _both(content) if n != name]
    return _archive(kind, content, _bomb(name, draw.random() < 0.5, tuple(members)))


@cache
def _bomb(name: str, zipped: bool, members: tuple[tuple[str, bytes], ...]) -> bytes:
    """Packing the zeros takes a second, so a bomb may be thrown twice."""
    whole = ((name, bytes(BOMB_BYTES)), *members)
    if zipped:
        return _zipped(*whole)
    return _tarred(*((tarfile.TarInfo(n), data) for n, data in whole))


def _archive_members(draw: random.Random, content: Content, kind: str) -> Hostile:
    """Far too many members, a file twice, or one missing."""
    config, weights = _both(content)
    match draw.randrange(6):
        case 0:
            members = [*((f"{i}.txt", b"") for i in range(10_001)), config, weights]
        case 1:
            members = [config, weights, (f"a/{config[0]}", config[1])]
        case 2:
            members = [config]
        case 3:
            members = [weights]
        case 4:
            members = [(f"a/{config[0]}", config[1]), (f"b/{weights[0]}", weights[1])]
        case _:
            members = [config, ("adapter_model.bin", weights[1])]
    return _archive(kind, content, _zipped(*members))


def _archive_bits(draw: random.Random, content: Content, kind: str) -> Hostile:
    whole = draw.choice([content.archive, _zipped(*_both(content))])
    if draw.random() < 0.4:
        return _archive(kind, content, _cut(draw, whole))
    return _archive(kind, content, _flip(draw, whole, 0, len(whole), draw.randint(1, 20)))


def _archive(kind: str, content: Content, packed: bytes) -> Hostile:
    return Hostile(kind, content.config, content.weights, packed)


_CHANGES: dict[str, Callable[[random.Random, Content, str], Hostile]] = {
    **{kind: _edited for kind in _EDITS},
    "header bits": _header_bits,
    "values": _values,
    "noise in the weights": _body_noise,
    "weights cut off": _weights_cut,
    "weights too long": _weights_longer,
    "no weights file": _another_kind,
    "config value": _config_value,
    "config key": _config_key,
    "another format": _format,
    "config bits": _config_bits,
    "no config": _config_whole,
    "path in an archive": _archive_path,
    "link in an archive": _archive_link,
    "archive bomb": _archive_bomb,
    "members of an archive": _archive_members,
    "archive bits": _archive_bits,
}
