"""How a byte-level BPE of a GGUF file splits text before it merges: ``tokenizer.ggml.pre``.

A vocabulary gives the right tokens only with the splitting that its merges were learned with. The file names it by a
word of llama.cpp's; the expressions are those of the published ``tokenizer.json`` of each family. A list of several is
applied one after the other, each to the pieces that the previous left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.errors import ModelLoadError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_SUFFIX}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CASED = rf"{_LEAD}{_UPPER}*{_LOWER}+{{suffix}}|{_LEAD}{_UPPER}+{_LOWER}*{{suffix}}"
_SIGNS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = _CASED.replace("{suffix}", "") + rf"|\p{{N}}|{_SIGNS_SLASH}|{_SPACES}"
_GPT4O = _CASED.replace("{suffix}", _SUFFIX + "?") + rf"|\p{{N}}{{1,3}}|{_SIGNS_SLASH}|{_SPACES}"
_NOT_HAN = "&&[^\\p{Han}]]"
_KIMI_CASED = (_CASED.replace(_UPPER, _UPPER[:-1] + _NOT_HAN).replace(_LOWER, _LOWER[:-1] + _NOT_HAN)).replace(
    "{suffix}", _SUFFIX + "?"
)
_KIMI_K2 = rf"[\p{{Han}}]+|{_KIMI_CASED}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_SEED_CODER = rf"{_SUFFIX}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CJK_V3 = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Letters that have a case, which DeepSeek's tokenizer.json lists one by one; `\p{L}` holds many more.
_DEEPSEEK_LETTERS = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"
_DEEPSEEK_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
_FALCON_SIGNS = r"[\p{P}\$\+<=>\^~\|`]+"


@dataclasses.dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way of splitting.

    Attributes:
        splits: regular expressions, applied in this order.
        whole_words: a piece that is in the vocabulary is that token, whatever the merges say.
        adds_bos: texts begin with BOS where the file does not say.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False


_LLAMA3_TYPE = PreTokenizer((_LLAMA3,), whole_words=True, adds_bos=True)
_DIGIT_BY_DIGIT = PreTokenizer((r"\p{N}", _GPT2))
_TYPES: tuple[tuple[str, PreTokenizer], ...] = (
    ("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", _LLAMA3_TYPE),
    ("dbrx smaug-bpe glm4 chatglm-bpe", PreTokenizer((_LLAMA3,))),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", PreTokenizer((_QWEN2,))),
    ("qwen35", PreTokenizer((_QWEN35,))),
    ("tekken", PreTokenizer((_TEKKEN,), whole_words=True, adds_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_GPT4O,))),
    ("kimi-k2", PreTokenizer((_KIMI_K2,))),
    ("gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling", PreTokenizer((_GPT2,))),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", _DIGIT_BY_DIGIT),
    ("falcon", PreTokenizer((_FALCON_SIGNS, _GPT2, "[0-9][0-9][0-9]"))),
    ("deepseek-llm", PreTokenizer((r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_SIGNS, r"\s+$", _CJK, r"\p{N}+"))),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense joyai-llm", PreTokenizer((r"\p{N}{1,3}", _CJK_V3, _DEEPSEEK_V3))),
    ("seed-coder", PreTokenizer((_SEED_CODER,))),
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizer((_BAILING,))),
    ("exaone-moe", PreTokenizer((_EXAONE_MOE,))),
    ("bloom poro-chat gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: kind for names, kind in _TYPES for name in names.split()}


def pre_tokenizer_of(metadata: Mapping[str, Any]) -> PreTokenizer | None:
    """The splitting that a GGUF file states, None where its tokenizer is no byte-level BPE and has none.

    Raises:
        ModelLoadError: if it is of a type that is not known here: text would be split in another way than the
            vocabulary was made for.
    """
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return None
    name = metadata.get("tokenizer.ggml.pre", "default")
    kind = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ModelLoadError(
            f"{str(name)[:100]!r} is not a known pre-tokenizer, and another would split text in other ways "
            f"than the vocabulary was made for; known are {', '.join(sorted(PRE_TOKENIZERS))}.",
            field="tokenizer.ggml.pre",
            remedy="Use the model's folder of safetensors with its tokenizer.json, or a file converted with one of "
            "these.",
        )
    return kind


def set_pre_tokenizer(tokenizer: Any, kind: PreTokenizer) -> None:
    """Let a transformers tokenizer split text so."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in kind.splits]
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.model.ignore_merges = kind.whole_words
