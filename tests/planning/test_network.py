"""The network's arithmetic, against published measurements and by hand."""

import pytest

from lightning_danube.planning.network import LATENCY, Group, Network

DGX = Network(450e9, 8, 400e9)


@pytest.mark.parametrize(("nodes", "latency"), [(1, 12.9e-6), (2, 55.5e-6), (16, 235e-6)])
def test_latencies_are_those_that_were_published(nodes: int, latency: float) -> None:
    assert DGX.latency(Group(8 * nodes, 8)) == pytest.approx(latency)


def test_nodes_have_the_bandwidth_that_was_published() -> None:
    """3 to 16 nodes of 8 H100 with 3,200 Gb/s: 320 to 350 GB/s in an all-reduce (The Smol Training Playbook)."""
    assert 320e9 <= DGX.bandwidth(Group(64, 8)) <= 350e9
    assert DGX.bandwidth(Group(8, 8)) == pytest.approx(393e9)


def test_a_group_has_the_share_of_the_adapters_that_its_devices_have() -> None:
    assert DGX.bandwidth(Group(16, 1)) == DGX.bandwidth(Group(16 * 8, 8)) / 8
    ethernet = Network(450e9, 8, 12.5e9)
    assert ethernet.bandwidth(Group(16, 8)) == pytest.approx(0.85 * 12.5e9)


def test_a_ring_sends_all_but_one_share() -> None:
    group = Group(4, 8)
    assert DGX.gather(4e9, group) == pytest.approx(LATENCY + 3e9 / DGX.bandwidth(group))
    assert DGX.sum(4e9, group) == pytest.approx(LATENCY + 6e9 / DGX.bandwidth(group))
    assert DGX.gather(4e9, Group(1, 8)) == DGX.sum(4e9, Group(1, 8)) == 0


def test_short_messages_are_slow() -> None:
    group = Group(64, 8)
    rates = [size / DGX.gather(size, group) for size in (1e4, 1e6, 1e8, 1e10)]
    assert rates == sorted(rates) and rates[0] < rates[-1] / 1000


def test_a_node_that_is_used_in_part_is_a_node() -> None:
    assert [Group(ranks, 8).nodes for ranks in (1, 8, 9, 12, 16, 17)] == [1, 1, 2, 2, 2, 3]
    assert DGX.latency(Group(12, 8)) == pytest.approx(55.5e-6)


def test_nodes_send_no_faster_than_their_devices() -> None:
    slow_links = Network(50e9, 8, 400e9)
    assert slow_links.bandwidth(Group(16, 8)) == slow_links.bandwidth(Group(8, 8)) == pytest.approx(50e9 * 786 / 900)
