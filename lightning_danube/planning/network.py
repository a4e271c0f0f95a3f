"""Predicts how long devices take to send weights and gradients to each other.

A collective operation takes a latency and, beside it, its bytes at the bandwidth of the slowest link. So short messages
are slow. The latencies and the shares of the makers' bandwidths are measurements that Hugging Face published for nodes
of 8 H100 with 3,200 Gb/s ("The Smol Training Playbook", October 2025, section "Infrastructure").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LINK_SHARE = 786 / 900
"""Share of the data sheet's bandwidth that devices of one node reach: 786 of 900 GB/s in both directions."""
NETWORK_SHARE = 42.5 / 50
"""Share of the network's bandwidth that two nodes reach: 42 to 43 of 50 GB/s for each device."""
LATENCY = 12.9e-6
"""Seconds of an all-reduce of a few bytes within a node."""
LATENCY_OF_TWO_NODES = 55.5e-6
LATENCY_OF_A_NODE = (235e-6 - LATENCY_OF_TWO_NODES) / 14
"""Seconds that each node beyond two adds: 16 nodes take 235 microseconds."""

NODE_BANDWIDTH = 400e9
"""Bytes per second that a node sends, in one direction, if the user states nothing: eight adapters of 400 Gb/s, as in
NVIDIA's DGX H100 and H200."""


@dataclass(frozen=True)
class Group:
    """Devices that take part in one collective operation.

    Args:
        ranks: number of devices.
        of_a_node: how many of them are in one node.
    """

    ranks: int
    of_a_node: int

    @property
    def nodes(self) -> int:
        return math.ceil(self.ranks / self.of_a_node)


@dataclass(frozen=True)
class Network:
    """The links between devices.

    Args:
        link: bytes per second from a device to its node, in one direction.
        devices: devices of a node. They share the node's adapters.
        node: bytes per second from a node to the others, in one direction, by all its adapters.
    """

    link: float
    devices: int = 8
    node: float = NODE_BANDWIDTH

    def latency(self, group: Group) -> float:
        """Returns the seconds of an operation of a few bytes."""
        if group.nodes == 1:
            return LATENCY
        return LATENCY_OF_TWO_NODES + LATENCY_OF_A_NODE * (group.nodes - 2)

    def bandwidth(self, group: Group) -> float:
        """Returns the bytes per second of a ring through all devices of the group.

        All devices of a node communicate at once, so a group has the share of the adapters that its devices have.
        """
        inside = LINK_SHARE * self.link
        if group.nodes == 1:
            return inside
        return min(inside, NETWORK_SHARE * self.node * min(1.0, group.of_a_node / self.devices))

    def gather(self, bytes_: float, group: Group) -> float:
        """Returns the seconds to gather a tensor of so many bytes, or to sum it and leave each device its share."""
        if group.ranks == 1:
            return 0.0
        return self.latency(group) + bytes_ * (group.ranks - 1) / group.ranks / self.bandwidth(group)

    def sum(self, bytes_: float, group: Group) -> float:
        """Returns the seconds to sum a tensor over the group and leave each device the whole sum."""
        if group.ranks == 1:
            return 0.0
        return self.latency(group) + 2 * bytes_ * (group.ranks - 1) / group.ranks / self.bandwidth(group)
