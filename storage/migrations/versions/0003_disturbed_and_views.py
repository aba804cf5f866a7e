"""What disturbed a run, what its quality was measured against, and the views for people who ask in SQL."""

import sqlalchemy as sa
from alembic import op

from storage.views import create_views, drop_views

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("runs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("disturbed", sa.Text(), nullable=False, server_default="[]"))
        batch_op.add_column(sa.Column("quality_reference", sa.Text(), nullable=True))
    create_views(op.get_bind())


def downgrade() -> None:
    drop_views(op.get_bind())
    for name in ("quality_reference", "disturbed"):
        # Not in a batch: that makes the table again on SQLite, and dropping the old one would take all requests along.
        op.execute(f"ALTER TABLE runs DROP COLUMN {name}")
