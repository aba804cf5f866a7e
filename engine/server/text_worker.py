"""The process that tokenizes and fills chat templates for the worker. Started by :mod:`engine.server.texts`.

A checkpoint's chat template is a program and its tokenizer holds regular expressions: either may run for ever or want
all memory, and no thread can be ended. This process can. It speaks over the socket it inherits: a length of four
bytes, then a JSON document: what the tokenizer is (before the first job, and whenever it changes), or a job.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from typing import Any

_NICE = 5  # whoever decodes goes first
_GRACE_S = 2.0
_SETUP_S = 60.0

Document = dict[str, Any]


def send(channel: socket.socket, document: Document) -> None:
    """Write one document."""
    content = json.dumps(document).encode()
    channel.sendall(struct.pack(">I", len(content)) + content)


def receive(channel: socket.socket) -> Document | None:
    """Read one document; None if the other side has gone."""
    head = _exactly(channel, 4)
    content = head and _exactly(channel, struct.unpack(">I", head)[0])
    return dict(json.loads(content)) if content else None


def _exactly(channel: socket.socket, count: int) -> bytes | None:
    content = bytearray()
    while len(content) < count:
        piece = channel.recv(min(count - len(content), 1 << 20))
        if not piece:
            return None
        content += piece
    return bytes(content)


class _Texts:
    """One tokenizer and its chat template."""

    def __init__(self, setup: Document) -> None:
        self._template: str | None = setup["template"]
        self._special_tokens: Document = setup["special_tokens"]
        self._most_characters: int = setup["max_characters"]
        self._slow = pickle.loads(base64.b64decode(setup["pickled"])) if setup["pickled"] else None
        if setup["tokenizer"]:
            from tokenizers import Tokenizer

            self._fast = Tokenizer.from_str(setup["tokenizer"])
            self._fast.no_truncation()
            self._fast.no_padding()

    def encode(self, texts: list[str], special: bool) -> Document:
        """Token ids of each text, as the transformers tokenizer gives them."""
        if self._slow is not None:
            return {"ids": [list(self._slow(text, add_special_tokens=special)["input_ids"]) for text in texts]}
        return {"ids": [self._fast.encode(text, add_special_tokens=special).ids for text in texts]}

    def chat(self, messages: list[Document]) -> Document:
        """Token ids of the filled template, or why it refused."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                [messages], chat_template=self._template, add_generation_prompt=True, **self._special_tokens
            )
            text = str(rendered[0])
            text.encode()  # a template may cut a pair of surrogates
        except MemoryError:
            raise
        except Exception as error:  # templates raise whatever they like for roles they do not know
            return {"refused": f"{error}"[:500] or type(error).__name__}
        if len(text) > self._most_characters:
            return {"too_long": len(text)}
        return self.encode([text], special=False)


def _answer(texts: _Texts, job: Document) -> Document:
    try:
        return texts.chat(job["messages"]) if "messages" in job else texts.encode(job["texts"], job["special"])
    except MemoryError:
        return {"failed": "they need more memory than --text-memory-mib allows"}
    except Exception as error:  # the tokenizer's own: it is said, and this process goes on
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def main(descriptor: int) -> None:
    """Serve jobs until the other side has gone."""
    channel = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the worker says when to end
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    import transformers.utils.chat_template_utils  # noqa: F401  now, and not while the first chat waits for it

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    texts: _Texts | None = None
    seconds = 0.0
    while (document := receive(channel)) is not None:
        # The kernel ends this process if a job does not, also when nobody is left to do it.
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_S if texts else _SETUP_S)
        if "special_tokens" in document:
            resource.setrlimit(resource.RLIMIT_AS, (document["memory_mib"] << 20,) * 2)
            texts, seconds, answer = _Texts(document), document["seconds"], {"ready": True}
        else:
            assert texts is not None
            answer = _answer(texts, document)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(channel, answer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
