"""The record as the pages see it: opened once per database, shared by all tabs and by the recorder's threads."""

from __future__ import annotations

import threading

from storage import Store, open_store
from storage.database import database_url

_stores: dict[str, Store] = {}
_lock = threading.Lock()


def get_store() -> Store:
    """The store that HEADROOM_DB (or HEADROOM_HOME) names now.

    The first call opens it, applies migrations, and marks runs that a dead dashboard left running as failed. Not
    ``st.cache_resource``: the recorder's threads, which belong to no session, need it too.

    Raises:
        StorageError: if it cannot be opened; the next call tries again.
    """
    url = database_url()
    name = url.render_as_string(hide_password=False)
    with _lock:
        if name not in _stores:
            store = open_store(name)
            store.mark_orphans()
            _stores[name] = store
        return _stores[name]


def close_stores() -> None:
    """Close every database, at the end of the process or of a test."""
    with _lock:
        for store in _stores.values():
            store.close()
        _stores.clear()
