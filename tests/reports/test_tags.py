"""Tags are found by their longest beginning, and name callbacks that exist."""

from lightning_danube import callbacks
from lightning_danube.reports.tags import TAGS, UNKNOWN, tag_called


def test_a_tag_has_the_longest_beginning() -> None:
    assert tag_called("mix/stage") is TAGS["mix/stage"]
    assert tag_called("mix/web") is tag_called("mix/") is TAGS["mix/"]
    assert tag_called("other") is UNKNOWN


def test_a_group_is_logged_by_the_callback_of_its_first_tag() -> None:
    assert tag_called("throughput/").class_path == "lightning_danube.callbacks.Throughput"
    assert tag_called("loss/").class_path is None


def test_callbacks_of_tags_exist() -> None:
    assert {tag.callback for tag in TAGS.values() if tag.callback} <= set(callbacks.__all__)
