"""Layer 7: messages between peers. `transport` is what the others see; `iroh_transport` and `memory` do it."""
