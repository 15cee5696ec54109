"""which files have some bytes: pictures that are not copied are read from them

Revision ID: 0005
Revises: 0004
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_source_file_sha256"), "source_file", ["sha256"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_source_file_sha256"), table_name="source_file")
