"""Readings of the engine's GPU in the samples of a run; NULL in runs recorded before, and without a GPU."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("gpu_power_w", sa.Double()),
    ("gpu_utilization_percent", sa.Double()),
    ("gpu_memory_bytes", sa.BigInteger()),
    ("gpu_sm_clock_mhz", sa.BigInteger()),
)


def upgrade() -> None:
    with op.batch_alter_table("samples", schema=None) as batch_op:
        for name, kind in _COLUMNS:
            batch_op.add_column(sa.Column(name, kind, nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("samples", schema=None) as batch_op:
        for name, _ in reversed(_COLUMNS):
            batch_op.drop_column(name)
