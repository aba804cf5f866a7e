"""The measured record: runs with everything needed to repeat them, in SQLite or any database SQLAlchemy speaks.

    store = open_store()              # HEADROOM_DB, else headroom.db under HEADROOM_HOME; migrations are applied
    store.begin_run(result)           # "running", owned by this process
    store.save_run(result)            # the complete record, in one transaction
    store.list_runs(RunFilter(model="smollm2-135m"), order_by="output_tokens_s")

Nothing here imports Streamlit or the engine's working parts, only its result types.
"""

from storage.errors import StorageError
from storage.queries import ComparisonRow, Facets, RunFilter, RunRow
from storage.records import UnshowableRun
from storage.store import ImportReport, Store, open_store

__all__ = [
    "ComparisonRow",
    "Facets",
    "ImportReport",
    "RunFilter",
    "RunRow",
    "StorageError",
    "Store",
    "UnshowableRun",
    "open_store",
]
