"""Hostile checkpoints: a tiny model as a GGUF file and as a folder of safetensors, damaged in all ways we think of.

Each generator is given a seed, a count and an empty folder, and yields (name of the damage, what was damaged). The same
seed gives the same damages. Whatever reads them must load them or refuse them with a ``HeadroomError``: no other error,
no crash, no wait, no memory by the numbers they state.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.gguf_names import gguf_name

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, LAYERS, CONTEXT = 64, 4, 2, 16, 96, 2, 256
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": WIDTH,
    "vocab_size": 257,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "eos_token_id": 256,
    "torch_dtype": "float32",
}
#: What takes the place of a value: wrong kinds, wrong signs, and numbers that nobody may allocate or loop by.
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 7, 10**9, 2**31, 2**32, 2**63, 2**64, 10**18, 10**400, -(10**18), 0.5, 1e308),
    *(-1e308, 5e-324, float("nan"), float("inf"), float("-inf"), "", "7", "x" * 10_000, "\ud800", "../../etc/passwd"),
    *([], {}, [None], [[]], [1] * 2000, {"a": {"b": {}}}, ["full_attention"], [float("nan")] * 8),
)
_FIELDS_BESIDE = (
    *("sliding_window", "use_sliding_window", "layer_types", "rope_scaling", "rope_parameters", "quantization_config"),
    *("partial_rotary_factor", "attn_logit_softcapping", "final_logit_softcapping", "max_window_layers", "auto_map"),
    *("original_max_position_embeddings", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "text_config"),
    *("mlp_only_layers", "decoder_sparse_step", "query_pre_attn_scalar", "sliding_window_pattern", "bos_token_id"),
)
_ROPE_FIELDS = (
    *("rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "attention_factor"),
    *("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"),
    *("short_factor", "long_factor", "full_attention", "sliding_attention", "partial_rotary_factor"),
)
_ARCHITECTURES = (
    *("MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM"),
    *("Gemma3ForCausalLM", "Phi3ForCausalLM", "GPTNeoXForCausalLM", "NoSuchForCausalLM"),
)


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    """The model's weights by their Hugging Face names, float32, the same at every call."""
    random_numbers = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (257, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (257, HIDDEN),
    }
    for index in range(LAYERS):
        shapes |= {
            f"model.layers.{index}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
                "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
                "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
                "mlp.gate_proj": (WIDTH, HIDDEN),
                "mlp.up_proj": (WIDTH, HIDDEN),
                "mlp.down_proj": (HIDDEN, WIDTH),
            }.items()
        }
    return {name: random_numbers.standard_normal(shape).astype(np.float32) * 0.2 for name, shape in shapes.items()}


# -- configurations ----------------------------------------------------------------------------------------------------


def config_mutations(seed: int, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what was done, a configuration), as :func:`write_config` writes it into a folder."""
    chance = random.Random(seed)
    for number in range(count):
        config = copy.deepcopy(CONFIG)
        if chance.random() < 0.3:
            config["architectures"] = [chance.choice(_ARCHITECTURES)]
            del config["model_type"]
        done = [_hurt_config(chance, config) for _ in range(chance.choice((1, 1, 1, 2, 3)))]
        yield f"config {number}: {config.get('architectures')!r:.40}: {', '.join(done)}", config


def _hurt_config(chance: random.Random, config: dict[str, Any]) -> str:
    way = chance.choice(("value", "value", "value", "beside", "rope", "delete", "sizes"))
    if way == "rope":
        kinds = ("linear", "llama3", "yarn", "longrope", "dynamic", "default", "ntk")
        rope = {"rope_type": chance.choice(kinds), "factor": 4.0}
        for field in chance.sample(_ROPE_FIELDS, 3):
            rope[field] = chance.choice(HOSTILE)
        config[chance.choice(("rope_scaling", "rope_parameters"))] = rope
        return f"rope {rope!r:.60}"
    if way == "sizes":  # heads beyond the embedding, and sizes that disagree with the tensors
        field = chance.choice([field for field, value in config.items() if type(value) is int] or ["hidden_size"])
        value = config.get(field) or 1
        config[field] = chance.choice((value + 1, value * 2, max(value // 2, 1), value * 1_000_003)) if value else 1
        return f"{field} = {config[field]}"
    field = chance.choice(_FIELDS_BESIDE if way == "beside" else list(config) or ["hidden_size"])
    if way == "delete":
        config.pop(field, None)
        return f"no {field}"
    config[field] = chance.choice(HOSTILE)
    return f"{field} = {config[field]!r:.40}"


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """As ``config.json`` of a model folder; lone surrogates as escapes, NaN and infinity as Python writes them."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


# -- safetensors -------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, tokenizer: Any) -> Path:
    """The model as a folder of safetensors with a transformers tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, CONFIG)
    header, data = safetensors_parts()
    write_safetensors(folder / "model.safetensors", header, data)
    tokenizer.save_pretrained(folder)
    return folder


def safetensors_parts() -> tuple[dict[str, Any], bytes]:
    """(the header as an object, the data) of the model's one file."""
    header: dict[str, Any] = {}
    data = b""
    for name, values in tensors().items():
        raw = values.tobytes()
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def write_safetensors(path: Path, header: Any, data: bytes, *, length: int | None = None) -> None:
    """Write a file whose header may say anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def safetensors_mutations(seed: int, count: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """(what was done, the folder): it is made whole again before each damage.

    Args:
        folder: made by :func:`write_folder`.
    """
    chance = random.Random(seed)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for number in range(count):
        for path in folder.iterdir():
            if path.name not in whole:
                path.unlink()
        for name, content in whole.items():
            (folder / name).write_bytes(content)
        hurt = chance.choice(_SAFETENSORS_DAMAGES)
        yield f"safetensors {number}: {hurt.__name__.removeprefix('_')}: {hurt(chance, folder)}", folder


def _file_cut(chance: random.Random, folder: Path) -> str:
    path = folder / chance.choice(("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"))
    content = path.read_bytes()
    length = chance.randrange(len(content))
    path.write_bytes(content[:length])
    return f"{path.name} ends after {length}"


def _bytes_changed(chance: random.Random, folder: Path) -> str:
    path = folder / chance.choice(("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"))
    content = bytearray(path.read_bytes())
    reach = min(len(content), 2500)
    for _ in range(chance.choice((1, 3, 20))):
        content[chance.randrange(reach)] = chance.randrange(256)
    path.write_bytes(content)
    return path.name


def _header_length(chance: random.Random, folder: Path) -> str:
    header, data = safetensors_parts()
    length = chance.choice((0, 1, 2**20, 2**31, 2**62, 2**63, 2**64 - 1))
    write_safetensors(folder / "model.safetensors", header, data, length=length)
    return str(length)


def _header_text(chance: random.Random, folder: Path) -> str:
    texts = (b"", b"[]", b"null", b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}", b'{"a":1}', b"{" * 8, b"NaN")
    text = chance.choice(texts)
    write_safetensors(folder / "model.safetensors", text, safetensors_parts()[1])
    return repr(text[:20])


def _entry_changed(chance: random.Random, folder: Path) -> str:
    header, data = safetensors_parts()
    name = chance.choice(list(header))
    field = chance.choice(("dtype", "shape", "data_offsets", None))
    if field is None:
        header[name] = chance.choice(HOSTILE)
    else:
        header[name][field] = chance.choice(
            (*HOSTILE, "BF16", "F16", "I64", "F8_E4M3", "Q4", [64, -64], [2**40, 2**40])
        )
    write_safetensors(folder / "model.safetensors", header, data)
    return f"{name} {field}"


def _offsets_moved(chance: random.Random, folder: Path) -> str:
    header, data = safetensors_parts()
    name, other = chance.sample(list(header), 2)
    begin, end = header[name]["data_offsets"]
    shift = chance.choice((1, -1, 4, -4, 64, len(data), 2**40, 2**63))
    moved = [header[other]["data_offsets"][0], header[other]["data_offsets"][0] + end - begin]
    header[name]["data_offsets"] = chance.choice((moved, [begin + shift, end + shift], [end, begin]))
    write_safetensors(folder / "model.safetensors", header, data)
    return f"{name} {header[name]['data_offsets']}"


def _tensor_of_another_shape(chance: random.Random, folder: Path) -> str:
    """A file that agrees with itself, and not with its configuration."""
    values = tensors()
    name = chance.choice(list(values))
    way = chance.choice(("missing", "extra", "wider", "longer", "transposed", "flat", "scalar", "empty", "nan"))
    tensor = values.pop(name)
    made = {
        "missing": None,
        "extra": tensor,
        "wider": np.concatenate([tensor, tensor], axis=-1),
        "longer": np.concatenate([tensor, tensor]),
        "transposed": tensor.T.copy(),
        "flat": tensor.reshape(-1),
        "scalar": tensor.reshape(-1)[:1].reshape(()),
        "empty": tensor[:0],
        "nan": np.full_like(tensor, np.nan),
    }[way]
    if made is not None:
        values[name] = made
    if way == "extra":
        values[f"{name}.extra"] = tensor
    header, data = {}, b""
    for key, value in values.items():
        raw = np.ascontiguousarray(value).tobytes()
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    write_safetensors(folder / "model.safetensors", header, data)
    return f"{way} {name}"


def _index_astray(chance: random.Random, folder: Path) -> str:
    names = list(tensors())
    outside = ("../model.safetensors", "/etc/passwd", "..\\..\\x", "a/../../x", "", ".", "missing.safetensors", "C:\\x")
    stray = chance.choice((*outside, "x" * 5000, "a\0b", 7, None, [], "config.json", "~/x", "//host/share"))
    table: Any = dict.fromkeys(names, "model.safetensors") | {chance.choice(names): stray}
    table = chance.choice((table, table, table, [], None, "x", {"no such tensor": "model.safetensors"}))
    index = {"metadata": {"total_size": chance.choice(HOSTILE)}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"{stray!r:.40}"


def _config_text(chance: random.Random, folder: Path) -> str:
    base = json.dumps(CONFIG)
    texts = (
        *("", "[]", "null", "7", '"x"', "[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000, base[:-1], "\ufeff" + base),
        *(base[:-1] + ', "hidden_size": -4}', base.replace("64", "1e400", 1), base.replace("64", "9" * 5000, 1)),
        *(base[:-1] + ', "x": ' + "[" * 500 + "]" * 500 + "}", base.replace("10000.0", "NaN")),
    )
    text = chance.choice(texts)
    (folder / "config.json").write_text(text)
    return text[:30]


def _tokenizer_changed(chance: random.Random, folder: Path) -> str:
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    way = chance.choice(("vocab", "added", "model", "pre", "decoder", "text", "gone", "code"))
    if way == "vocab":
        vocab = state["model"]["vocab"]
        vocab[chance.choice(list(vocab))] = chance.choice((-1, 257, 100_000, 2**31, 2**32 - 1, 2**32, 2**63, "x", None))
    elif way == "added":
        identity = chance.choice((-1, 300, 10**6, 2**32 - 1, 2**33, None))
        state["added_tokens"].append({**state["added_tokens"][0], "id": identity, "content": "<new>"})
    elif way in ("model", "pre", "decoder"):
        state[{"pre": "pre_tokenizer"}.get(way, way)] = chance.choice((*HOSTILE[:8], [], {}, {"type": "WordPiece"}))
    path.write_text(chance.choice(("", "[]", "{}", "null", "[" * 5000)) if way == "text" else json.dumps(state))
    if way == "gone":
        path.unlink()
    if way == "code":
        settings = folder / "tokenizer_config.json"
        told = json.loads(settings.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
        settings.write_text(json.dumps(told | {"tokenizer_class": "Evil"}))
        (folder / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    return way


_SAFETENSORS_DAMAGES: tuple[Callable[[random.Random, Path], str], ...] = (
    *(_file_cut, _bytes_changed, _header_length, _header_text, _entry_changed, _offsets_moved),
    *(_tensor_of_another_shape, _tensor_of_another_shape, _index_astray, _config_text, _tokenizer_changed),
)


# -- GGUF --------------------------------------------------------------------------------------------------------------

_U8, _I8, _U16, _U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _F64 = 0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 12
_LAYOUT = {_U8: "<B", _I8: "<b", _U16: "<H", _U32: "<I", _I32: "<i", _F32: "<f", _BOOL: "<B", _U64: "<Q", _F64: "<d"}
_ALIGNMENT = 32


@dataclasses.dataclass
class GGUFTensor:
    """A tensor as the header describes it, and its data; the two need not agree."""

    name: bytes
    sizes: list[int]
    kind: int
    data: bytes
    offset: int | None = None


@dataclasses.dataclass
class GGUFParts:
    """A GGUF file in parts that can be changed one by one.

    Attributes:
        pairs: (key, its value with its type in front).
        counts: of tensors and pairs as stated, where not the true ones.
    """

    pairs: list[tuple[bytes, bytes]]
    tensors: list[GGUFTensor]
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int | None, int | None] = (None, None)

    def to_bytes(self) -> bytes:
        """The file."""
        num_tensors, num_pairs = self.counts
        out = self.magic + struct.pack(
            "<IQQ",
            self.version,
            len(self.tensors) if num_tensors is None else num_tensors,
            len(self.pairs) if num_pairs is None else num_pairs,
        )
        out += b"".join(_string(key) + value for key, value in self.pairs)
        data = b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            sizes = struct.pack(f"<I{len(tensor.sizes)}Q", len(tensor.sizes), *tensor.sizes)
            out += _string(tensor.name) + sizes + struct.pack("<IQ", tensor.kind, offset % 2**64)
            data += tensor.data + bytes(-len(tensor.data) % _ALIGNMENT)
        return out + bytes(-len(out) % _ALIGNMENT) + data


def gguf_parts() -> GGUFParts:
    """The model as llama.cpp would write it, with a tokenizer of bytes."""
    pairs = {
        "general.architecture": _value(_STRING, b"llama"),
        "general.alignment": _value(_U32, _ALIGNMENT),
        "llama.block_count": _value(_U32, LAYERS),
        "llama.context_length": _value(_U32, CONTEXT),
        "llama.embedding_length": _value(_U32, HIDDEN),
        "llama.feed_forward_length": _value(_U32, WIDTH),
        "llama.attention.head_count": _value(_U32, HEADS),
        "llama.attention.head_count_kv": _value(_U32, KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": _value(_F32, 1e-5),
        "llama.rope.freq_base": _value(_F32, 10000.0),
        "tokenizer.ggml.model": _value(_STRING, b"gpt2"),
        "tokenizer.ggml.pre": _value(_STRING, b"gpt-2"),
        "tokenizer.ggml.tokens": _strings([*_byte_alphabet(), "<|end|>"]),
        "tokenizer.ggml.token_type": struct.pack(f"<IIQ{257}i", _ARRAY, _I32, 257, *([1] * 256 + [3])),
        "tokenizer.ggml.merges": _strings(["! !"][:0]),
        "tokenizer.ggml.eos_token_id": _value(_U32, 256),
    }
    stored = [
        GGUFTensor(gguf_name(name).encode(), list(reversed(values.shape)), 0, values.tobytes())
        for name, values in tensors().items()
    ]
    return GGUFParts([(key.encode(), value) for key, value in pairs.items()], stored)


def gguf_mutations(seed: int, count: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """(what was done, the damaged file); each takes the place of the one before."""
    chance = random.Random(seed)
    path = folder / "model.gguf"
    for number in range(count):
        hurt = chance.choice(_GGUF_DAMAGES)
        parts = gguf_parts()
        done = hurt(chance, parts)
        content = parts.to_bytes()
        if hurt is _raw_bytes:
            done, content = _hurt_bytes(chance, content)
        path.write_bytes(content)
        if chance.random() < 0.05:  # as large as it claims to be, without taking the disk
            with path.open("r+b") as stream:
                stream.truncate(2**36)
        yield f"gguf {number}: {hurt.__name__.removeprefix('_')}: {done}", path


def _raw_bytes(chance: random.Random, parts: GGUFParts) -> str:
    return ""


def _hurt_bytes(chance: random.Random, content: bytes) -> tuple[str, bytes]:
    header = content.index(b"token_embd.weight") + 1000
    way = chance.choice(("cut", "cut header", "flip", "words", "garbage"))
    if way.startswith("cut"):
        length = chance.randrange(header if way == "cut header" else len(content))
        return f"ends after {length}", content[:length]
    if way == "garbage":
        return way, b"GGUF" + chance.randbytes(chance.choice((0, 4, 20, 5000)))
    changed = bytearray(content)
    for _ in range(chance.choice((1, 2, 10))):
        place = chance.randrange(header)
        if way == "flip":
            changed[place] ^= 1 << chance.randrange(8)
        else:
            changed[place : place + 8] = struct.pack("<Q", chance.choice((0, 2**31, 2**32, 2**63, 2**64 - 1)))
    return way, bytes(changed)


def _beginning(chance: random.Random, parts: GGUFParts) -> str:
    way = chance.choice(("magic", "version", "tensors", "pairs"))
    huge = chance.choice((0, 1, 10**6, 2**31, 2**40, 2**63, 2**64 - 1))
    if way == "magic":
        parts.magic = chance.choice((b"GGML", b"FUGG", b"\0\0\0\0", b"gguf"))
    elif way == "version":
        parts.version = chance.choice((0, 1, 2, 4, 2**24 * 3, 2**32 - 1))
    else:
        parts.counts = (huge, None) if way == "tensors" else (None, huge)
    return f"{way} {huge}"


def _pair(chance: random.Random, parts: GGUFParts) -> str:
    index = chance.randrange(len(parts.pairs))
    key, value = parts.pairs[index]
    way = chance.choice(("value", "value", "value", "gone", "twice", "key", "beside"))
    if way == "gone":
        del parts.pairs[index]
    elif way == "twice":
        parts.pairs.append((key, _hostile_value(chance)))
    elif way == "key":
        parts.pairs[index] = (chance.choice((b"\xff\xfe\xfd", b"", b"x" * 70_000, key + b"\0")), value)
    elif way == "beside":
        others = ("split.count", "llama.expert_count", "llama.attention.key_length", "llama.rope.dimension_count")
        others += ("llama.rope.scaling.type", "llama.attention.value_length", "llama.attention.sliding_window")
        others += ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.chat_template")
        key = chance.choice(others).encode()
        parts.pairs.append((key, _hostile_value(chance)))
    else:
        parts.pairs[index] = (key, _hostile_value(chance))
    return f"{way} {key.decode()}"


def _hostile_value(chance: random.Random) -> bytes:
    number = chance.choice((0, 1, 3, 5, 255, 2**31 - 1, 2**32 - 1))
    return chance.choice(
        (
            _value(_U32, number),
            _value(_U32, number),
            _value(_I32, -1),
            _value(_U64, chance.choice((2**63, 10**18, 2**64 - 1))),
            _value(_F32, chance.choice((float("nan"), float("inf"), -1.0, 0.0, 1e30))),
            _value(_F64, chance.choice((1e308, 5e-324))),
            _value(_BOOL, chance.choice((0, 1, 2))),
            _value(_STRING, chance.choice((b"", b"x", b"\xff\xfe", b"yarn", b"llama", b"x" * 10_000))),
            struct.pack("<IQ", _STRING, 2**63),
            struct.pack("<IIQ", _ARRAY, _U32, chance.choice((2**20, 2**40, 2**63))),
            struct.pack("<IIQ", _ARRAY, _STRING, chance.choice((2**20, 2**40, 2**63))),
            struct.pack("<IIQIIQ", _ARRAY, _ARRAY, 1, _ARRAY, _ARRAY, 1) * 50,
            struct.pack("<IIQII", _ARRAY, _U32, 2, 4, 4),
            _strings(["a", "b"]),
            _strings([]),
            struct.pack("<I", chance.choice((13, 99, 2**32 - 1))),
        )
    )


def _tensor(chance: random.Random, parts: GGUFParts) -> str:
    index = chance.randrange(len(parts.tensors))
    tensor = parts.tensors[index]
    way = chance.choice(("gone", "twice", "extra", "sizes", "kind", "offset", "name", "width"))
    if way == "gone":
        del parts.tensors[index]
    elif way in ("twice", "extra"):
        name = tensor.name if way == "twice" else chance.choice((b"blk.99.attn_q.weight", b"rope_freqs.weight", b"x"))
        parts.tensors.append(dataclasses.replace(tensor, name=name))
    elif way == "sizes":
        size = chance.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
        tensor.sizes = chance.choice(([], [size], [size, size], [1] * 4, [1] * 9, tensor.sizes[::-1], [64, size]))
    elif way == "kind":
        tensor.kind = chance.choice((1, 2, 3, 8, 12, 14, 16, 24, 26, 27, 28, 30, 31, 39, 99, 2**32 - 1))
    elif way == "offset":
        tensor.offset = chance.choice((0, 1, 32, 2**20, 2**40, 2**63, 2**64 - 32))
    elif way == "name":
        tensor.name = chance.choice((b"", b"\xff", b"x" * 100_000, b"token_embd.weight", b"blk..attn_q.weight"))
    else:  # a tensor that agrees with itself, and not with the metadata
        rows = chance.choice((1, 2, 63, 128))
        tensor.sizes, tensor.data = [HIDDEN, rows], bytes(4 * HIDDEN * rows)
    return f"{way} {tensor.name[:30]!r}"


_GGUF_DAMAGES: tuple[Callable[[random.Random, GGUFParts], str], ...] = (
    *(_raw_bytes, _raw_bytes, _beginning, _pair, _pair, _pair, _tensor, _tensor, _tensor),
)


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(kind: int, value: Any) -> bytes:
    return struct.pack("<I", kind) + (_string(value) if kind == _STRING else struct.pack(_LAYOUT[kind], value))


def _strings(values: list[str]) -> bytes:
    packed = b"".join(_string(value.encode()) for value in values)
    return struct.pack("<IIQ", _ARRAY, _STRING, len(values)) + packed


def _byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())
