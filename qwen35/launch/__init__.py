"""The processes of a run on this node, and its connections to the other nodes. Knows no model."""
