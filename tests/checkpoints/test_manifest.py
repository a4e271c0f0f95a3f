"""What is believed of a manifest."""

import json
from pathlib import Path

from lightning_danube.checkpoints.files import read_manifest


def test_entries_without_a_hash_are_left_out(tmp_path: Path) -> None:
    """A bare size stands in lists of sharded checkpoints of an older version only, and says nothing of the content."""
    listed = {"step_1.ckpt": 7, "step_2.ckpt": {"bytes": 7, "sha256": "0" * 64}}
    (tmp_path / "manifest.json").write_text(json.dumps({"checkpoints": listed}))
    assert read_manifest(tmp_path) == {"step_2.ckpt": (7, "0" * 64)}
