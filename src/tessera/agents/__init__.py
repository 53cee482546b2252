"""Layer 4: agents that pay, hire and hold money.

Assume that the model obeys the attacker and that the operator's session is stolen: `mandates` say what may be paid,
`ledger` makes each intent one payment, `guard` stands before every tool. They need no model, no network and no torch.
"""
