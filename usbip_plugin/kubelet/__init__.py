"""Everything that talks to the node's kubelet, or to the API server about this node."""
