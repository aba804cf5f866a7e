"""ik_llama.cpp, the fork of llama.cpp for CPUs, as a peer, through the low-level functions of ik-llama-cpp-python.

It steps exactly as :mod:`.llama_cpp` does; only the calls differ where the fork kept or changed llama.cpp's API.

Options: slots; repack (interleave the weights at load where there is a variant of their format, its ``-rtr``),
flash_attention ("on", "off"); and ``weights``, which names what the file holds.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any, ClassVar

from tests.benchmarks.peers.llama_cpp import BATCH_TOKENS, MICRO_BATCH_TOKENS, SteppedLlama
from tests.benchmarks.peers.protocol import Order, serve

_SEQUENCE_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "llama_kv_cache_seq_rm": ([ctypes.c_void_p, *[ctypes.c_int32] * 3], ctypes.c_bool),
    "llama_kv_cache_seq_cp": ([ctypes.c_void_p, *[ctypes.c_int32] * 4], None),
    "llama_model_size": ([ctypes.c_void_p], ctypes.c_uint64),
    "llama_print_system_info": ([], ctypes.c_char_p),
}
"""Functions of the library that the binding does not declare: ``{name: (argument types, result type)}``."""


def _preload() -> None:
    """Load what its main library needs: built from source, that does not say that it lies beside it."""
    found = importlib.util.find_spec("ik_llama_cpp")
    if found is not None and found.origin is not None:
        for library in Path(found.origin).parent.glob("lib/libggml*.so"):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


class IkLlamaCpp(SteppedLlama):
    """The fork's context, stepped in batches."""

    package = "ik-llama-cpp-python"
    defaults: ClassVar[dict[str, Any]] = {"repack": False, "flash_attention": "off"}

    def __init__(self, order: Order) -> None:
        _preload()
        from ik_llama_cpp import _ctypes_api as binding

        self._library: Any = binding._lib
        for name, (arguments, result) in _SEQUENCE_FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, result
        super().__init__(order, binding)

    def _load_model(self, path: str) -> Any:
        parameters = self._lib.llama_model_default_params()
        parameters.repack_tensors = self.options["repack"]
        parameters.use_mmap = not self.options["repack"]  # repacked in place, which a mapped file cannot be
        parameters.flash_attn = self.options["flash_attention"] == "on"
        return self._lib.llama_model_load_from_file(path.encode(), parameters)

    def _context_parameters(self, slots: int, tokens: int) -> Any:
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx = slots * tokens
        parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = BATCH_TOKENS, MICRO_BATCH_TOKENS, slots
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.flash_attn = self.options["flash_attention"] == "on"
        return parameters

    def _model_size(self) -> int:
        return int(self._library.llama_model_size(self.model))

    def _system(self) -> str:
        return str(self._library.llama_print_system_info().decode())

    def _forget_all(self) -> None:
        self._lib.llama_kv_cache_clear(self.context)

    def _forget(self, slot: int) -> None:
        self._library.llama_kv_cache_seq_rm(self.context, slot, -1, -1)

    def _copy(self, source: int, target: int) -> None:
        self._library.llama_kv_cache_seq_cp(self.context, source, target, -1, -1)


if __name__ == "__main__":
    serve(IkLlamaCpp)
