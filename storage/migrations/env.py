"""Run by Alembic with the connection that :mod:`storage.database` opened, inside its transaction and its lock."""

from typing import Any, Literal

from alembic import context
from sqlalchemy.types import TypeDecorator

from storage.tables import Base


def render_item(kind: str, item: Any, _autogenerate: Any) -> str | Literal[False]:
    """Migrations name the plain type of a column: our own column types may change or go, migrations stay."""
    if kind == "type" and isinstance(item, TypeDecorator):
        return f"sa.{type(item.impl_instance).__name__}()"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot alter a column in place
    compare_type=True,
    render_item=render_item,
)
with context.begin_transaction():
    context.run_migrations()
