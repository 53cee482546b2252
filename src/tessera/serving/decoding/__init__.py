"""A split model answers token by token: stages that pass messages on, and the gateway's end of their sessions."""
