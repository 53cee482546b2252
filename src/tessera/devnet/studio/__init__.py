"""A media studio of agents: they hire each other and deliver a market recap as a video, paid through the escrow."""
